"""Training sets whose images lie within large files: what is common to all formats."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from PIL import Image

from latentgen.errors import DatasetError, InputError
from latentgen.files import quote
from latentgen.image_file import read_image_bytes
from latentgen.prompts import check_prompts
from latentgen.train.config import ArchiveData
from latentgen.train.data import Captions, Sample
from latentgen.train.data.cropping import Cropper, Size

# Far over every photograph, and little beside the memory that decoding one takes.
MAX_IMAGE_BYTES = 256 * 2**20
MAX_CAPTION_BYTES = 2**20
CAPTION_KEYS = ("text", "caption")
_LISTED = 50
_KEPT_SIZES = 2**16


class ArchiveSample(NamedTuple):
    """A sample that can be used.

    Attributes:
        name: what to call it.
        size: height and width of its image.
        captions: of its image.
    """

    name: str
    size: Size
    captions: tuple[str, ...]


class ArchiveSurvey(NamedTuple):
    """All samples of a set that can be used, and what is wrong with the rest."""

    samples: list[ArchiveSample]
    problems: list[str]


def captions_of(value: object) -> tuple[str, ...]:
    """One caption or several.

    Raises:
        InputError: it is neither a string nor a list of them, or cannot be encoded.
    """
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not texts:
        raise InputError(f"the caption is {quote(value)}; it must be a string, or a list of strings")
    texts = list(texts)
    if not all(isinstance(text, str) for text in texts):
        raise InputError(f"the caption is {quote(value)}; it must be a string, or a list of strings")
    check_prompts(texts)
    return tuple(texts)


def json_captions(data: bytes) -> tuple[str, ...]:
    """The captions in the JSON of a sample, under the first of `CAPTION_KEYS` that it has.

    Raises:
        InputError: it is no JSON, or has none of them.
    """
    try:
        fields = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"it is no JSON: {error}") from None
    key = next((key for key in CAPTION_KEYS if isinstance(fields, dict) and key in fields), None)
    if key is None:
        raise InputError(f"it has no {' and no '.join(map(quote, CAPTION_KEYS))}")
    return captions_of(fields[key])


def text_captions(data: bytes) -> tuple[str, ...]:
    """The caption in a text file.

    Raises:
        InputError: it is not in UTF-8, or cannot be encoded.
    """
    try:
        return captions_of(data.decode("utf-8-sig").strip())
    except UnicodeDecodeError as error:
        raise InputError(f"it is not in UTF-8: {error}") from None


class ArchiveCropper:
    """What a recipe says of the views and the captions of images that lie in large files.

    Attributes:
        varies: whether two views of an image can differ.
    """

    def __init__(self, config: ArchiveData) -> None:
        self._cropper = Cropper(config)
        self.varies = self._cropper.varies
        self._prefix = config.caption_prefix
        self._shuffle_after = config.keep_tokens if config.caption_shuffle else None
        self._size_for = lru_cache(_KEPT_SIZES)(self._cropper.size_for)

    def bucket(self, original: Size) -> Size:
        """Height and width of the views of an image of this size; (0, 0) is one of which nothing is known."""
        return self._cropper.sizes[0] if len(self._cropper.sizes) == 1 else self._size_for(original)

    def texts(self, captions: Sequence[str]) -> tuple[str, ...]:
        """The captions as they are trained on, but for the order of their parts."""
        return tuple(f"{self._prefix} {caption}".strip() if self._prefix else caption for caption in captions)

    def sample(self, image: Image.Image, captions: Sequence[str], rng: random.Random) -> Sample:
        """The image scaled to cover its rectangle, and cropped; random where the recipe says so."""
        original = (image.height, image.width)
        frame = self._cropper.draw(original, rng)
        texts = self.texts(captions)
        drawn = Captions(texts, (1.0,) * len(texts), self._shuffle_after)
        return Sample(frame.show(image), drawn, original, frame.corner)


def image_size(data: bytes, name: str) -> tuple[int, int]:
    """Height and width of an image that is decoded for it.

    Raises:
        InputError: it cannot be read.
    """
    image = read_image_bytes(data, name)
    return image.height, image.width


def leave_out(bad: Sequence[str]) -> None:
    """Warn of the images that the recipe says to skip."""
    if bad:
        warnings.warn(f"{len(bad):,} images are left out: {_listed(bad)}", stacklevel=3)


def refuse(where: str, problems: Sequence[str]) -> None:
    """Raise DatasetError if there are problems; it names the first fifty and counts all."""
    if problems:
        raise DatasetError(f"{where} has {len(problems):,} problems: {_listed(problems)}")


def _listed(problems: Sequence[str]) -> str:
    more = f"; and {len(problems) - _LISTED:,} more" if len(problems) > _LISTED else ""
    return "; ".join(problems[:_LISTED]) + more
