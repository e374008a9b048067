"""Captions in files beside the images."""

from __future__ import annotations

from pathlib import Path

from latentgen.prompts import check_prompts

CAPTION_SUFFIXES = (".txt", ".caption")


def caption_file(image: Path) -> Path | None:
    """The file beside an image that holds its captions, if there is one."""
    files = (image.with_suffix(suffix) for suffix in CAPTION_SUFFIXES)
    return next((file for file in files if file.is_file()), None)


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
