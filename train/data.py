"""Training data: captioned images whose order and randomness are functions of (seed, step, sample)."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from latentgen.errors import DatasetError
from latentgen.train.config import EmojiData, FolderData

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
MAX_PIXELS = 64 * 2**20


@dataclass(frozen=True)
class View:
    """One rendering or crop of an item: an RGB image, and what it may be called, with the weight of each caption."""

    image: Image.Image
    captions: tuple[str, ...]
    weights: tuple[float, ...]

    def draw_caption(self, rng: random.Random) -> str:
        """One of the captions, drawn by weight."""
        return rng.choices(self.captions, weights=self.weights)[0]


class CaptionedImages(Protocol):
    """A set of items, each seen through random views."""

    image_size: int

    def __len__(self) -> int: ...

    def view(self, index: int, rng: random.Random) -> View:
        """Draw a view of item `index`."""
        ...

    def corpus(self) -> list[str]:
        """The captions that a tokenizer for this set is made from."""
        ...


class ImageFolder:
    """A folder of images with captions from `metadata.jsonl` (`file_name`, `text`) or same-stem `.txt` files.

    Raises:
        DatasetError: listing every image that has no caption or cannot be read, and every row without its image.
    """

    def __init__(self, path: Path, image_size: int) -> None:
        self.image_size = image_size
        if not path.is_dir():
            raise DatasetError(f"{path} is not a folder of images; set data.path in the recipe")
        captions, problems = _folder_captions(path)
        problems += [problem for file in captions if (problem := _image_problem(file)) is not None]
        if not captions and not problems:
            problems.append(f"no image here; known kinds: {', '.join(sorted(IMAGE_SUFFIXES))}")
        if problems:
            raise DatasetError(f"{path} has {len(problems)} problems: " + "; ".join(problems))
        self._items = sorted(captions.items())

    def __len__(self) -> int:
        return len(self._items)

    def view(self, index: int, rng: random.Random) -> View:
        """The whole image, its shorter side fitted to `image_size`, cropped to the centre square."""
        file, caption = self._items[index]
        with Image.open(file) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
        square = (self.image_size, self.image_size)
        return View(ImageOps.fit(upright, square, Image.Resampling.LANCZOS), (caption,), (1.0,))

    def corpus(self) -> list[str]:
        """All captions."""
        return [caption for _, caption in self._items]


def _folder_captions(path: Path) -> tuple[dict[Path, str], list[str]]:
    """The captions of a folder by image file, and what is wrong with them."""
    metadata = path / "metadata.jsonl"
    if not metadata.is_file():
        images = [file for file in sorted(path.iterdir()) if file.suffix.lower() in IMAGE_SUFFIXES]
        texts = {file: file.with_suffix(".txt") for file in images}
        problems = [
            f"{file.name}: no caption; write it into {text.name}"
            for file, text in texts.items()
            if not text.is_file()
        ]
        return {
            file: text.read_text("utf-8").strip() for file, text in texts.items() if text.is_file()
        }, problems
    captions: dict[Path, str] = {}
    problems = []
    for number, line in enumerate(metadata.read_text("utf-8").splitlines(), start=1):
        where = f"metadata.jsonl line {number}"
        try:
            row = json.loads(line)
            file, text = path / row["file_name"], row["text"]
        except (ValueError, TypeError, KeyError):
            problems.append(f'{where}: must be {{"file_name": "...", "text": "..."}}')
            continue
        if not isinstance(text, str):
            problems.append(f"{where}: text must be a string, found {type(text).__name__}")
        elif not file.resolve().is_relative_to(path.resolve()):
            problems.append(f"{where}: {row['file_name']} is outside the folder")
        elif file in captions:
            problems.append(f"{where}: {row['file_name']} has a caption already")
        elif not file.is_file():
            problems.append(f"{where}: {row['file_name']} is not there")
        else:
            captions[file] = text
    return captions, problems


def _image_problem(file: Path) -> str | None:
    try:
        with Image.open(file) as image:
            if image.width * image.height > MAX_PIXELS:
                return f"{file.name}: {image.width}x{image.height} is over the limit of {MAX_PIXELS >> 20} megapixels"
            image.load()
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError) as error:
        return f"{file.name}: not a whole image ({error})"
    return None


def open_data(config: EmojiData | FolderData) -> CaptionedImages:
    """The data set that a recipe names."""
    if isinstance(config, EmojiData):
        from latentgen.train.emoji import EmojiSet

        return EmojiSet(image_size=config.image_size)
    return ImageFolder(config.path, config.image_size)


def sample_rng(seed: int, *position: int | str) -> random.Random:
    """The generator of one position of a run, for instance (step, sample): the same wherever and whenever asked."""
    return random.Random("/".join(map(str, (seed, *position))))


def sample_noise(seed: int, step: int, samples: Sequence[int], shape: Sequence[int], purpose: str) -> Tensor:
    """Standard normal noise [len(samples), *shape] in float32, each row a function of (seed, purpose, step, sample)."""
    rows = []
    for sample in samples:
        generator = torch.Generator().manual_seed(sample_rng(seed, purpose, step, sample).getrandbits(63))
        rows.append(torch.randn(*shape, generator=generator))
    return torch.stack(rows)


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, count: int) -> tuple[int, ...]:
    order = list(range(count))
    sample_rng(seed, "epoch", epoch).shuffle(order)
    return tuple(order)


def item_at(seed: int, position: int, count: int) -> int:
    """The item at a position of the endless shuffled sequence, in which each epoch shows every item once."""
    epoch, place = divmod(position, count)
    return _permutation(seed, epoch, count)[place]


@dataclass(frozen=True)
class BatchPlan:
    """Which samples of which step one process computes together.

    Attributes:
        step: the optimiser step, from 0.
        batch_size: samples of the step in all processes together.
        samples: positions within the step's global batch.
        items: the item of each sample.
    """

    seed: int
    step: int
    batch_size: int
    samples: tuple[int, ...]
    items: tuple[int, ...]

    def rngs(self, purpose: str) -> Iterator[random.Random]:
        """A generator for each sample, independent for each purpose."""
        return (sample_rng(self.seed, purpose, self.step, sample) for sample in self.samples)

    def noise(self, shape: Sequence[int], purpose: str) -> Tensor:
        """Standard normal noise [samples, *shape], independent for each purpose."""
        return sample_noise(self.seed, self.step, self.samples, shape, purpose)


def plan_step(
    seed: int, step: int, *, batch_size: int, count: int, parts: int, rank: int, processes: int
) -> list[BatchPlan]:
    """Split the global batch of a step over `processes` and into `parts` accumulated one after the other.

    The global batch is a function of (seed, step) alone, whatever the number of processes.
    """
    plans = []
    for part in range(parts):
        samples = tuple(range(batch_size))[part * processes + rank :: parts * processes]
        items = tuple(item_at(seed, step * batch_size + sample, count) for sample in samples)
        plans.append(BatchPlan(seed, step, batch_size, samples, items))
    return plans


def to_tensor(images: Sequence[Image.Image]) -> Tensor:
    """RGB images of one size to [B, 3, H, W] in -1..1, float32, channels_last."""
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return pixels.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)
