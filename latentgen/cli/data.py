"""The command that looks at a training set before anything is trained on it."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from latentgen.cli.text import one_line
from latentgen.errors import ConfigError, DatasetError
from latentgen.files import quote

if TYPE_CHECKING:
    from latentgen.train.config import FolderData, HuggingFaceData, KohyaData, WebDataset
    from latentgen.train.data.check import Report


def check_data(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR",
            help="The folder of the images; of webdataset also a name such as '{000..127}.tar'.",
        ),
    ],
    kind: Annotated[
        Literal["imagefolder", "kohya", "webdataset", "huggingface"],
        typer.Option(help="How it is laid out, as data.kind says in a recipe."),
    ] = "imagefolder",
    image_size: Annotated[
        int, typer.Option(metavar="PIXELS", help="Side of the square that views are, or area of the buckets.")
    ] = 512,
    buckets: Annotated[
        bool,
        typer.Option("--buckets", help="Keep to the images' own ratios of sides, in aspect-ratio buckets."),
    ] = False,
    bucket_step: Annotated[
        int, typer.Option(metavar="PIXELS", help="Of which the sides of buckets are multiples.")
    ] = 64,
    min_side: Annotated[
        int | None,
        typer.Option(
            metavar="PIXELS",
            help="The shortest side of a bucket. [default: half of --image-size]",
            show_default=False,
        ),
    ] = None,
    max_side: Annotated[
        int | None,
        typer.Option(
            metavar="PIXELS",
            help="The longest side of a bucket. [default: twice --image-size]",
            show_default=False,
        ),
    ] = None,
    caption: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="The caption of images that have none, as data.caption of a recipe. "
            "[default: such images are a problem]",
            show_default=False,
        ),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(help="Of a huggingface set that has several.", show_default=False),
    ] = None,
    image_column: Annotated[
        str | None, typer.Option(help="Of a huggingface set. [default: image]", show_default=False)
    ] = None,
    caption_column: Annotated[
        str | None, typer.Option(help="Of a huggingface set. [default: text]", show_default=False)
    ] = None,
) -> None:
    """Say everything that is wrong with images to train on, and how they would be trained on.

    \b
    latentgen check-data pictures --image-size 512
    latentgen check-data pictures --image-size 1024 --buckets --max-side 1536
    latentgen check-data pictures --caption "a photo of sks dog"
    latentgen check-data img --kind kohya --buckets
    latentgen check-data "shards/{000..127}.tar" --kind webdataset
    latentgen check-data pokemon --kind huggingface --split train

    An imagefolder holds images, in sub-folders too, and their captions in one of

    \b
    cat.txt beside cat.png   one caption; of several lines each is one, drawn equally often
    metadata.jsonl           {"file_name": "cat.png", "text": "a cat on a sofa"} in each line
    metadata.csv             with the columns file_name and text, or caption

    Rows of the metadata may name a mask_file_name (white where the loss counts) and a before_file_name (what the
    image is an edit of). A kohya folder holds sub-folders such as "10_sks dog": shown 10 times in an epoch, with the
    caption "sks dog" where no .txt file stands beside an image. Of webdataset the folder holds .tar files with pairs
    of an image and a .txt or .json; of huggingface what save_to_disk wrote, or parquet files.

    Every image is decoded. Problems are what training refuses: images that cannot be read or have no caption, rows
    without their image, and so on. Notes are what it takes: images smaller than their views, the same image twice,
    captions beyond the text encoder's window. Exits with 2 if there are problems.
    """
    try:
        from latentgen.train.data.check import check
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"check-data needs the module {error.name}: pip install 'latentgen[train]'"
        ) from None

    fields: dict[str, Any] = {"image_size": image_size, "buckets": buckets, "bucket_step": bucket_step}
    own = {
        "min_side": min_side,
        "max_side": max_side,
        "caption": caption,
        "split": split,
        "image_column": image_column,
        "caption_column": caption_column,
    }
    fields |= {name: value for name, value in own.items() if value is not None}
    report = check(_config(kind, folder, fields))
    for line in _lines(report):
        print(line)
    if report.problems:
        raise DatasetError(f"{quote(folder)} cannot be trained on as it is: mend what is listed above")


def _config(
    kind: str, folder: Path, fields: dict[str, Any]
) -> FolderData | KohyaData | WebDataset | HuggingFaceData:
    """The section of a recipe that the options are."""
    from pydantic import ValidationError

    from latentgen.train.config import FolderData, HuggingFaceData, KohyaData, WebDataset, in_one_line

    if kind != "imagefolder" and "caption" in fields:
        raise ConfigError("--caption is for --kind imagefolder: other kinds have captions of their own")
    try:
        if kind == "webdataset":
            name = f"{glob.escape(str(folder))}/*.tar" if folder.is_dir() else str(folder)
            return WebDataset(kind=kind, shards=(name,), **fields)
        if kind == "huggingface":
            return HuggingFaceData(kind=kind, path=folder, **fields)
        if kind == "kohya":
            return KohyaData(kind=kind, path=folder, **fields)
        return FolderData(kind="imagefolder", path=folder, **fields)
    except ValidationError as error:
        raise ConfigError(f"the options do not fit: {in_one_line(error)}") from None


def _lines(report: Report) -> list[str]:
    """The report as it is printed: counts, the table of buckets, notes, problems."""
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
