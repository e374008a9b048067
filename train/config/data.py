"""The sections of a recipe that name a training set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

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


Data = Annotated[EmojiData | FolderData, Field(discriminator="kind")]
