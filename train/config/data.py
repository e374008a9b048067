"""The sections of a recipe that name a training set."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from latentgen.train.config.base import Section

Side = Annotated[int, Field(ge=8, le=16384)]
MAX_REPEATS = 10_000


class EmojiData(Section):
    """The rendered emoji of Debian's fonts-noto-color-emoji.

    `held_out` of them, evenly spaced, are not trained on, for benchmarks.
    """

    kind: Literal["emoji"]
    image_size: Annotated[int, Field(ge=8, le=128)] = 64
    held_out: Annotated[int, Field(ge=0, le=1000)] = 0


class ImageData(Section):
    """How images are cropped, and captions changed.

    Images are scaled to cover the view and cropped, at the center or at random, and mirrored half of the time with
    `horizontal_flip`. A view is a square of `image_size`; with `buckets` it is the rectangle whose aspect
    ratio is nearest to the image's, with an area of at most `image_size` squared and sides that are multiples of
    `bucket_step` from `min_side` to `max_side` (by default half and twice `image_size`).

    `caption_prefix` is added before every caption. `caption_shuffle` shuffles the parts of a caption between commas
    each time it is drawn, except for the first `keep_tokens`.
    """

    image_size: Annotated[int, Field(ge=8, le=4096)]
    buckets: bool = False
    bucket_step: Annotated[int, Field(ge=1, le=1024)] = 64
    min_side: Side | None = None
    max_side: Side | None = None
    crop: Literal["center", "random"] = "center"
    horizontal_flip: bool = False
    caption_prefix: str = ""
    caption_shuffle: bool = False
    keep_tokens: Annotated[int, Field(ge=0, le=1000)] = 0

    @property
    def side_bounds(self) -> tuple[int, int]:
        """The shortest and the longest side of a bucket."""
        return (
            self.image_size // 2 if self.min_side is None else self.min_side,
            self.image_size * 2 if self.max_side is None else self.max_side,
        )

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if not self.buckets and (self.min_side, self.max_side) != (None, None):
            raise ValueError("min_side and max_side are for buckets; set buckets to true, or remove them")
        square = self.image_size // self.bucket_step * self.bucket_step
        shortest, longest = self.side_bounds
        if self.buckets and not (square > 0 and shortest <= square <= longest):
            raise ValueError(
                f"image_size {self.image_size} with bucket_step {self.bucket_step} makes a square of {square}; it must "
                f"lie within min_side and max_side, {shortest} to {longest}, and above 0"
            )
        if self.keep_tokens and not self.caption_shuffle:
            raise ValueError("keep_tokens needs caption_shuffle; set that to true, or remove keep_tokens")
        return self


class FolderData(ImageData):
    """A folder of images with their captions, and its sub-folders.

    ```yaml
    data:
      kind: imagefolder
      path: pictures
      image_size: 512
      buckets: true            # without: square center crops
      horizontal_flip: true
      caption: a photo of sks dog    # of the images that have none of their own
    ```

    Captions are in a `metadata.jsonl` or `metadata.csv` (`file_name`, relative to the file, and `text` or `caption`),
    or next to an image in a text file of the same stem, in which each line is a caption, all drawn equally often. Rows
    of the metadata may name more images: `mask_file_name` (white where the loss counts) and `before_file_name` (what
    this one is an edit of); other columns are ignored with a warning. Names that begin with a dot are ignored.

    `caption` is for images without one, which are otherwise an error; `repeats` is how often an epoch shows each image.
    Images that cannot be read are an error before training begins, or left out with a warning (`skip`).
    """

    kind: Literal["imagefolder"]
    path: Path
    caption: str | None = None
    repeats: Annotated[int, Field(ge=1, le=MAX_REPEATS)] = 1
    on_bad_image: Literal["error", "skip"] = "error"


class KohyaData(ImageData):
    """A folder laid out as for kohya's trainers: sub-folders named `REPEATS_NAME`, such as `10_sks dog`.

    ```yaml
    data:
      kind: kohya
      path: img                # holds "10_sks dog" and "1_dog"
      image_size: 512
      buckets: true
      caption_shuffle: true
      keep_tokens: 1
    ```

    Each image of a sub-folder appears `REPEATS` times in an epoch; `NAME` is the caption of images without a text file
    (`.txt`, `.caption`). Everything else is as in FolderData.
    """

    kind: Literal["kohya"]
    path: Path
    on_bad_image: Literal["error", "skip"] = "error"


class ArchiveData(ImageData):
    """The common fields of training sets in a few large files.

    With `check_images` every sample is read and decoded once before training begins; without it the first sample that
    cannot be used ends the run. Images that cannot be read are an error, or left out with a warning (`skip`), which
    needs `check_images`.
    """

    on_bad_image: Literal["error", "skip"] = "error"
    check_images: bool = True

    @model_validator(mode="after")
    def _checks_enough(self) -> Self:
        if not self.check_images and (self.buckets or self.on_bad_image == "skip"):
            raise ValueError("buckets, and on_bad_image: skip, need check_images: true")
        return self


_SCHEME = re.compile(r"\s*([A-Za-z][A-Za-z0-9+.-]+):")


def _local_shards(value: object) -> object:
    """One name or several as a tuple; commands and addresses are errors."""
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ValueError("must be a path, or a list of paths")
    for name in names:
        if match := _SCHEME.match(name):
            what = "runs a command" if match[1] == "pipe" else f"{match[1]}: is an address"
            raise ValueError(f"{name!r} {what}; only files are read: mount the storage, and name its path")
    return tuple(names)


ShardNames = Annotated[
    tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1), BeforeValidator(_local_shards)
]


class WebDataset(ArchiveData):
    """Tar files in the layout of WebDataset: the files of a sample follow each other and differ in their suffix.

    ```yaml
    data:
      kind: webdataset
      shards: /mnt/pictures/{00000..00999}.tar     # or a list, or a glob such as /mnt/pictures/*.tar
      image_size: 512
      index_dir: /mnt/index
    ```

    A sample is an image (`.jpg`, `.jpeg`, `.png` or `.webp`) and its caption: a `.txt`, or a `.json` whose `text` or
    `caption` is a string or a list of them. Other files are ignored. Shards are files on local or mounted file
    systems; nothing is unpacked, and images are read in place. All runs can share the indexes of shards (the offsets
    and sizes of their samples) in `index_dir`.
    """

    kind: Literal["webdataset"]
    shards: ShardNames
    index_dir: Path | None = None


class HuggingFaceData(ArchiveData):
    """A data set of the `datasets` library on disk; nothing is downloaded.

    ```yaml
    data:
      kind: huggingface
      path: pokemon            # made by save_to_disk, or a folder of parquet files
      split: train
      caption_column: text
      image_size: 512
    ```

    `split` may be omitted if there is only one. A caption is a string, or a list of strings of which one is drawn.
    """

    kind: Literal["huggingface"]
    path: Path
    split: str | None = None
    image_column: str = "image"
    caption_column: str = "text"


Data = Annotated[
    EmojiData | FolderData | KohyaData | WebDataset | HuggingFaceData, Field(discriminator="kind")
]
