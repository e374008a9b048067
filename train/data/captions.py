"""Captions in files beside the images."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from latentgen.prompts import check_prompts

CAPTION_SUFFIXES = (".txt", ".caption")


class CaptionFiles:
    """Which of some files hold the captions of the images beside them; their suffixes count in any case.

    Args:
        files: paths, sorted: of two that differ in the case of their suffix the last, which is in lower case, counts.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._files = {(file.with_suffix(""), file.suffix.lower()): file for file in files}

    def of(self, image: Path) -> Path | None:
        """The file with the captions of an image, if there is one."""
        stem = image.with_suffix("")
        found = (self._files.get((stem, suffix)) for suffix in CAPTION_SUFFIXES)
        return next((file for file in found if file is not None), None)


def read_captions(file: Path) -> tuple[str, ...]:
    """The captions in a file, one a line; blank lines are none, and a file without any other holds the empty caption.

    Raises:
        OSError, UnicodeDecodeError: it cannot be read.
        InputError: a caption holds what no tokenizer can read.
    """
    # splitlines() would cut captions at U+2028.
    lines = [line.strip() for line in file.read_text("utf-8-sig").split("\n")]
    captions = tuple(line for line in lines if line) or ("",)
    check_prompts(captions)
    return captions
