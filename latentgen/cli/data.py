"""The command that checks a training set before training."""

from __future__ import annotations

import glob
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from latentgen.cli.options import one_line, spread, train_extra
from latentgen.errors import ConfigError, DatasetError
from latentgen.files import quote

if TYPE_CHECKING:
    from latentgen.train.data.check import Report


@dataclass(frozen=True)
class DataOptions:
    """Fields of `data` in a recipe: how images are cropped, and the part of a huggingface dataset to use."""

    image_size: Annotated[
        int, typer.Option(metavar="PIXELS", help="Side of square crops, or of a square bucket.")
    ] = 512
    buckets: Annotated[
        bool, typer.Option("--buckets", help="Use aspect-ratio buckets instead of square crops.")
    ] = False
    bucket_step: Annotated[
        int, typer.Option(metavar="PIXELS", help="Sides of buckets are multiples of this.")
    ] = 64
    min_side: Annotated[
        int | None, typer.Option(metavar="PIXELS", help="Of a bucket. [default: half of --image-size]")
    ] = None
    max_side: Annotated[
        int | None, typer.Option(metavar="PIXELS", help="Of a bucket. [default: twice --image-size]")
    ] = None
    split: Annotated[str | None, typer.Option(help="Split of a huggingface dataset.")] = None
    image_column: Annotated[
        str | None, typer.Option(help="Image column of a huggingface dataset. [default: image]")
    ] = None
    caption_column: Annotated[
        str | None, typer.Option(help="Caption column of a huggingface dataset. [default: text]")
    ] = None


@spread
def check_data(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="The folder; for webdataset also a pattern such as '{000..127}.tar'."
        ),
    ],
    options: DataOptions,
    kind: Annotated[
        Literal["imagefolder", "kohya", "webdataset", "huggingface"],
        typer.Option(help="Its layout: data.kind of a recipe."),
    ] = "imagefolder",
    caption: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="The caption of images without one. [default: they are an error]"),
    ] = None,
) -> None:
    """Report every problem of a training set, and its buckets.

    \b
    latentgen check-data pictures --image-size 512
    latentgen check-data pictures --image-size 1024 --buckets --max-side 1536
    latentgen check-data pictures --caption "a photo of sks dog"
    latentgen check-data img --kind kohya --buckets
    latentgen check-data "shards/{000..127}.tar" --kind webdataset
    latentgen check-data pokemon --kind huggingface --split train

    An imagefolder holds images, in sub-folders too, and their captions in one of

    \b
    cat.txt next to cat.png  one caption per line, chosen with equal probability
    metadata.jsonl           {"file_name": "cat.png", "text": "a cat on a sofa"} in each line
    metadata.csv             with the columns file_name and text, or caption

    Rows of the metadata may name a mask_file_name (white where the loss counts) and a before_file_name (what the
    image is an edit of). A kohya folder holds sub-folders such as "10_sks dog": 10 repeats per epoch, with the
    caption "sks dog" for images without a .txt file. A webdataset folder holds .tar files with pairs of an image and
    a .txt or .json; a huggingface folder is what save_to_disk wrote, or holds parquet files.

    Every image is decoded. Problems stop training: unreadable images, missing captions, metadata rows without an image,
    and so on. Notes do not: images smaller than their crops, duplicate images, captions longer than the text
    encoder's window. Exits with 2 if there are problems.
    """
    with train_extra():
        from latentgen.train.data.check import check

    fields: dict[str, Any] = {**vars(options), "caption": caption}
    report = check(_config(kind, folder, {name: v for name, v in fields.items() if v is not None}))
    for line in _lines(report):
        print(line)
    if report.problems:
        raise DatasetError(f"{quote(folder)} has errors; fix the problems listed above")


def _config(kind: str, folder: Path, fields: dict[str, Any]) -> Any:
    """The options as the `data` section of a recipe."""
    from pydantic import TypeAdapter, ValidationError

    from latentgen.train.config import Data, in_one_line

    if kind != "imagefolder" and "caption" in fields:
        raise ConfigError("--caption is only for --kind imagefolder; remove it")
    if kind == "webdataset":
        fields["shards"] = (f"{glob.escape(str(folder))}/*.tar" if folder.is_dir() else str(folder),)
    else:
        fields["path"] = folder
    try:
        return TypeAdapter(Data).validate_python({"kind": kind, **fields})
    except ValidationError as error:
        raise ConfigError(f"invalid options: {in_one_line(error)}") from None


def _lines(report: Report) -> list[str]:
    """The printed report: counts, table of buckets, notes, problems."""
    samples = sum(count.samples for count in report.buckets.values())
    lines = [f"images: {report.images}, captions: {report.captions}, samples of an epoch: {samples}"]
    if report.buckets:
        lines += ["", f"{'width x height':>16} {'images':>9} {'samples':>9}"]
    for (height, width), count in report.buckets.items():
        lines.append(f"{f'{width} x {height}':>16} {count.images:>9} {count.samples:>9}")
    for title, messages in (("notes", report.notes), ("problems", report.problems)):
        if messages:
            lines += ["", f"{title}: {len(messages)}", *(f"  {one_line(message)}" for message in messages)]
    return lines if report.problems else [*lines, "", "no problems"]


COMMANDS = (check_data,)
