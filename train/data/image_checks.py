"""Image files, each decoded once: whether it can be read, its size, and the hash of its content."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

from tqdm import tqdm

from latentgen.errors import InputError
from latentgen.files import quote, wrong_content
from latentgen.image_file import read_image

S = TypeVar("S")
T = TypeVar("T")
# More would hold as many decoded images, of up to 192 MiB each.
THREADS = min(8, os.cpu_count() or 1)
_HEAD = 512


class ImageFacts(NamedTuple):
    """Facts of an image file.

    Attributes:
        size: height and width, upright.
        digest: of the file's bytes.
    """

    size: tuple[int, int]
    digest: bytes


def examine(files: Sequence[Path]) -> tuple[Mapping[Path, ImageFacts], Mapping[Path, str]]:
    """Decode all files, in threads: Pillow's decoders let others run. A bar shows the progress on a terminal.

    Returns:
        The facts of those that can be read, and what is wrong with the others.
    """
    facts: dict[Path, ImageFacts] = {}
    problems: dict[Path, str] = {}
    pool = ThreadPoolExecutor(THREADS)
    try:
        results = tqdm(
            pool.map(_examine, files),
            total=len(files),
            desc="reading the images",
            delay=1.0,
            disable=None,  # only where a terminal shows it
        )
        for file, result in zip(files, results, strict=True):
            if isinstance(result, str):
                problems[file] = result
            else:
                facts[file] = result
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for thousands of images
    return facts, problems


def _examine(file: Path) -> ImageFacts | str:
    try:
        with file.open("rb") as stream:
            if problem := wrong_content(stream.read(_HEAD)):
                return f"{quote(file)} is {problem}; replace or remove it"
            stream.seek(0)
            digest = hashlib.file_digest(stream, "sha256").digest()
        image = read_image(file)
    except OSError as error:
        return f"{quote(file)} cannot be read: {error.strerror or error}"
    except InputError as error:
        return str(error)
    return ImageFacts((image.height, image.width), digest)


def in_threads(function: Callable[[S], T], items: Iterable[S]) -> list[T]:
    """`function` of each item, several at a time: Pillow and files let others run meanwhile."""
    # Made for each call: the threads of a lasting pool would not be there after a fork.
    pool = ThreadPoolExecutor(THREADS)
    try:
        return list(pool.map(function, items))
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for thousands of images
