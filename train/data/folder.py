"""A training set of the user's own: a folder of images with their captions."""

from __future__ import annotations

import json
import random
import warnings
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from latentgen.errors import DatasetError, InputError, UnsafePathError
from latentgen.files import quote, safe_join
from latentgen.image_file import read_image
from latentgen.prompts import check_prompts
from latentgen.train.config import FolderData
from latentgen.train.data import Captions, View

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
METADATA = "metadata.jsonl"


class ImageFolder:
    """A folder of images with captions from `metadata.jsonl` (`file_name`, `text`) or same-stem `.txt` files.

    Every file is decoded once to begin with. Bad images are an error, or left out with a warning if the recipe says
    so; they are never replaced.

    Raises:
        DatasetError: listing every image that has no caption or cannot be read, and every row without its image.
    """

    def __init__(self, config: FolderData) -> None:
        self.image_size = config.image_size
        folder = config.path
        if not folder.is_dir():
            raise DatasetError(f"{quote(folder)} is not a folder of images; set data.path in the recipe")
        problems: list[str] = []
        captions = _read_metadata(folder, problems) if (folder / METADATA).is_file() else {}
        captions |= _read_texts(folder, captions, problems)
        bad = {file: problem for file in captions if (problem := _image_problem(file)) is not None}
        if config.on_bad_image == "skip" and bad:
            warnings.warn(f"{len(bad)} images are left out: {'; '.join(bad.values())}", stacklevel=2)
        else:
            problems += bad.values()
        self._items = sorted((file, text) for file, text in captions.items() if file not in bad)
        if not self._items and not problems:
            problems.append(f"no image that can be used; known kinds: {', '.join(sorted(SUFFIXES))}")
        if problems:
            raise DatasetError(f"{quote(folder)} has {len(problems)} problems: {'; '.join(problems)}")

    def __len__(self) -> int:
        return len(self._items)

    def view(self, index: int, rng: random.Random) -> View:
        """The image, its shorter side fitted to `image_size`, cropped to the centre square; nothing is random."""
        file, text = self._items[index]
        square = (self.image_size, self.image_size)
        image = ImageOps.fit(read_image(file), square, Image.Resampling.LANCZOS)
        return View(image, Captions((text,), (1.0,)))

    def corpus(self) -> list[str]:
        """All captions."""
        return [text for _, text in self._items]


def _read_metadata(folder: Path, problems: list[str]) -> dict[Path, str]:
    """The captions by image file; what is wrong with a row is added to `problems`."""
    try:
        lines = (
            (folder / METADATA).read_text("utf-8").split("\n")
        )  # splitlines() would cut captions at U+2028
    except (OSError, UnicodeDecodeError) as error:
        problems.append(f"{METADATA} cannot be read: {error}")
        return {}
    captions: dict[Path, str] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            file, text = _parse_row(folder, json.loads(line))
            if file in captions:
                raise ValueError(f"{quote(file.name)} has a caption already")
            captions[file] = text
        except (ValueError, RecursionError, UnsafePathError) as error:
            problems.append(f"{METADATA} line {number}: {error}")
    return captions


def _parse_row(folder: Path, row: Any) -> tuple[Path, str]:
    match row:
        case {"file_name": str(name), "text": str(text)}:
            file = safe_join(folder, name, "file_name")
        case _:
            raise ValueError('must be {"file_name": "...", "text": "..."}')
    if not file.is_file():
        raise ValueError(f"{quote(name)} is not there")
    check_prompts([text])
    return file, text


def _read_texts(folder: Path, known: dict[Path, str], problems: list[str]) -> dict[Path, str]:
    """The captions of the images that the metadata do not name, from text files of the same stem."""
    captions: dict[Path, str] = {}
    for file in sorted(folder.iterdir()):
        if file in known or file.suffix.lower() not in SUFFIXES:
            continue
        text_file = file.with_suffix(".txt")
        try:
            text = text_file.read_text("utf-8").strip()
            check_prompts([text])
            captions[file] = text
        except FileNotFoundError:
            problems.append(f"{file.name}: no caption; write it into {text_file.name} or {METADATA}")
        except (OSError, UnicodeDecodeError, InputError) as error:
            problems.append(f"{text_file.name}: {error}")
    return captions


def _image_problem(file: Path) -> str | None:
    try:
        read_image(file)
    except InputError as error:
        return str(error)
    return None
