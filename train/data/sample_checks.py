"""Reads and checks the images and captions of training sets, and reports their problems."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

from tqdm import tqdm

from latentgen.errors import DatasetError, InputError
from latentgen.files import quote
from latentgen.image_file import read_image_bytes
from latentgen.prompts import check_prompts
from latentgen.train.data.cropping import Size

S = TypeVar("S")
T = TypeVar("T")
# More would hold as many decoded images, of up to 192 MiB each.
THREADS = min(8, os.cpu_count() or 1)
# Far above any photograph, and little compared to the memory that decoding one takes.
MAX_IMAGE_BYTES = 256 * 2**20
# Keys of captions in JSON, and columns in tables: the first that is there counts.
CAPTION_KEYS = ("text", "caption")
_LISTED = 50


class UsableSample(NamedTuple):
    """A sample without problems: its name in messages, the size of its image, and how often an epoch shows it."""

    name: str
    size: Size
    captions: tuple[str, ...]
    repeats: int = 1


class DataSurvey(NamedTuple):
    """All usable samples of a training set, the problems that prevent training, and notes that do not."""

    samples: list[UsableSample]
    problems: list[str]
    notes: Sequence[str] = ()


class CheckedSample(NamedTuple):
    """The captions of a sample, the size and digest of its image, or their problems."""

    captions: tuple[str, ...] = ()
    size: Size | None = None
    digest: bytes = b""
    caption_problem: str | None = None
    image_problem: str | None = None


def check_sample(
    name: str, image: Callable[[], bytes], captions: Callable[[], tuple[str, ...]]
) -> CheckedSample:
    """Read a sample whose image is called `name` in messages; InputError and DatasetError become its problems."""
    checked = CheckedSample()
    try:
        checked = checked._replace(captions=captions())
    except (InputError, DatasetError) as error:
        checked = checked._replace(caption_problem=str(error))
    try:
        data = image()
        decoded = read_image_bytes(data, name)
    except (InputError, DatasetError) as error:
        return checked._replace(image_problem=str(error))
    return checked._replace(size=(decoded.height, decoded.width), digest=hashlib.sha256(data).digest())


def captions_of(value: object) -> tuple[str, ...]:
    """One caption or several.

    Raises:
        InputError: it is neither a string nor a list of them, or cannot be encoded.
    """
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not texts or not all(isinstance(text, str) for text in texts):
        raise InputError(f"the caption is {quote(value)}; it must be a string, or a list of strings")
    check_prompts(texts)
    return tuple(texts)


def decode_captions(data: bytes, *, is_json: bool) -> tuple[str, ...]:
    """The captions in a text file, or under the first of `CAPTION_KEYS` that a JSON object has.

    Raises:
        InputError: there is none, or it cannot be encoded.
    """
    try:
        text = data.decode("utf-8-sig")
        fields = json.loads(text) if is_json else {"text": text.strip()}
    except UnicodeDecodeError as error:
        raise InputError(f"it is not UTF-8: {error}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"it is not valid JSON: {error}") from None
    for key in CAPTION_KEYS:
        if isinstance(fields, dict) and key in fields:
            return captions_of(fields[key])
    raise InputError(f"it has no {' and no '.join(map(quote, CAPTION_KEYS))}")


def in_threads(function: Callable[[S], T], items: Sequence[S], *, title: str | None = None) -> list[T]:
    """Apply `function` to each item in threads: Pillow and file reads release the GIL. `title` shows a progress bar."""
    # A new pool for each call, because the threads of a shared one would not survive a fork.
    pool = ThreadPoolExecutor(THREADS)
    try:
        results = pool.map(function, items)
        # disable=None: only on a terminal
        return list(tqdm(results, title, len(items), delay=1.0, disable=None if title else True))
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for thousands of images


def refuse(
    where: str, problems: Sequence[str], bad_images: Sequence[str] = (), *, skip: bool = False
) -> None:
    """Raise DatasetError if there are problems; the message lists the first fifty and counts all.

    Bad images are problems, too; with `skip` they are only a warning.
    """
    if bad_images and skip:
        warnings.warn(f"{len(bad_images):,} images are left out: {_listed(bad_images)}", stacklevel=3)
    if found := [*problems, *(() if skip else bad_images)]:
        raise DatasetError(f"{where} has {len(found):,} problems: {_listed(found)}")


def _listed(problems: Sequence[str]) -> str:
    more = len(problems) - _LISTED
    rest = f"; and {more:,} more, which `latentgen check-data` lists" if more > 0 else ""
    return "; ".join(problems[:_LISTED]) + rest
