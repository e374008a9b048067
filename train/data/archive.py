"""Captions and errors of training sets whose images are stored within large files, for all formats."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from typing import NamedTuple

from latentgen.errors import DatasetError, InputError
from latentgen.files import quote
from latentgen.image_file import read_image_bytes
from latentgen.prompts import check_prompts
from latentgen.train.data.cropping import Size

# Far above any photograph, and little compared to the memory that decoding one takes.
MAX_IMAGE_BYTES = 256 * 2**20
MAX_CAPTION_BYTES = 2**20
CAPTION_KEYS = ("text", "caption")
_LISTED = 50


class ArchiveSample(NamedTuple):
    """A usable sample.

    Attributes:
        name: its name in messages.
        size: height and width of its image.
        captions: of its image.
    """

    name: str
    size: Size
    captions: tuple[str, ...]


class ArchiveSurvey(NamedTuple):
    """All usable samples of a set, and the problems of the others."""

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
        InputError: it is not JSON, or has none of them.
    """
    try:
        fields = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"it is not valid JSON: {error}") from None
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


def image_size(data: bytes, name: str) -> tuple[int, int]:
    """Height and width of an image, by decoding it.

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
    """Raise DatasetError if there are problems; the message lists the first fifty and counts all."""
    if problems:
        raise DatasetError(f"{where} has {len(problems):,} problems: {_listed(problems)}")


def _listed(problems: Sequence[str]) -> str:
    more = f"; and {len(problems) - _LISTED:,} more" if len(problems) > _LISTED else ""
    return "; ".join(problems[:_LISTED]) + more
