"""The sections of a recipe that name a training set."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from latentgen.train.config.base import Section


class EmojiData(Section):
    """The rendered emoji of Debian's fonts-noto-color-emoji.

    `held_out` of them, evenly chosen, are kept out of training, for benchmarks to measure on.
    """

    kind: Literal["emoji"]
    image_size: Annotated[int, Field(ge=8, le=128)] = 64
    held_out: Annotated[int, Field(ge=0, le=1000)] = 0


class FolderData(Section):
    """A folder of images, with captions in `metadata.jsonl` (`file_name`, `text`) or same-stem `.txt` files.

    Images that cannot be read are an error before training begins, or left out with a warning (`skip`).
    """

    kind: Literal["imagefolder"]
    path: Path
    image_size: Annotated[int, Field(ge=8, le=4096)]
    on_bad_image: Literal["error", "skip"] = "error"


class PackedData(Section):
    """What training sets have in common that lie in a few large files.

    With `check_images` every sample is read and decoded once before training begins; without it nothing is read ahead,
    and the first sample that cannot be used ends the run with its name. Images that cannot be read are an error, or
    left out with a warning (`skip`), which `check_images` has to find.
    """

    image_size: Annotated[int, Field(ge=8, le=4096)]
    on_bad_image: Literal["error", "skip"] = "error"
    check_images: bool = True

    @model_validator(mode="after")
    def _can_skip(self) -> Self:
        if self.on_bad_image == "skip" and not self.check_images:
            raise ValueError(
                "on_bad_image: skip needs check_images: true, as what is left out must be known before"
            )
        return self


_SCHEME = re.compile(r"\s*([A-Za-z][A-Za-z0-9+.-]+):")


def _local_shards(value: object) -> object:
    """One name or several as a tuple; a command or an address is refused by name."""
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ValueError("must be a path, or a list of paths")
    for name in names:
        if match := _SCHEME.match(name):
            what = "runs a command" if match[1] == "pipe" else f"{match[1]}: is an address"
            raise ValueError(
                f"{name!r} {what}; only files are read: mount the storage, and name the path that it has then"
            )
    return tuple(names)


ShardNames = Annotated[
    tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1), BeforeValidator(_local_shards)
]


class WebDataset(PackedData):
    """Tar files in the layout of WebDataset: the files of a sample follow each other and differ in their suffix.

    ```yaml
    data:
      kind: webdataset
      shards: /mnt/pictures/{00000..00999}.tar     # or a list, or a glob such as /mnt/pictures/*.tar
      image_size: 512
      index_dir: /mnt/index
    ```

    A sample is an image (`.jpg`, `.jpeg`, `.png` or `.webp`) and its caption: a `.txt`, or a `.json` whose `text` or
    `caption` is a string or a list of them. Other files are passed over. Shards are files on local or mounted file
    systems; nothing is unpacked, and images are read where they lie. What is known of each shard (where its samples
    lie, their sizes, which cannot be used) is kept in `index_dir`, for all runs to share, until the shard changes.
    """

    kind: Literal["webdataset"]
    shards: ShardNames
    index_dir: Path | None = None


class HuggingFaceData(PackedData):
    """A data set of the `datasets` library on disk; nothing is downloaded.

    ```yaml
    data:
      kind: huggingface
      path: pokemon            # made by save_to_disk, or a folder of parquet files
      split: train
      caption_column: text
      image_size: 512
    ```

    `split` may be left out if there is one only. A caption is a string, or a list of strings of which one is drawn.
    """

    kind: Literal["huggingface"]
    path: Path
    split: str | None = None
    image_column: str = "image"
    caption_column: str = "text"
