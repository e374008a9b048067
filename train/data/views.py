"""What a training set is to those who learn from it: items, each seen through random views."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from latentgen.errors import ConfigError


class Captions(NamedTuple):
    """What one image may be called.

    Attributes:
        texts: the captions.
        weights: how often each is drawn.
        shuffle_after: how many of the parts between commas stay at the beginning of a caption while the others change
            places each time it is drawn, as in kohya's trainers; None to leave captions as they are.
    """

    texts: tuple[str, ...]
    weights: tuple[float, ...]
    shuffle_after: int | None = None

    def draw(self, rng: random.Random) -> str:
        """One of the captions, drawn by weight, its parts shuffled if they are to be."""
        text = rng.choices(self.texts, weights=self.weights)[0]
        if self.shuffle_after is None:
            return text
        parts = [part.strip() for part in text.split(",")]
        kept, others = parts[: self.shuffle_after], parts[self.shuffle_after :]
        rng.shuffle(others)
        return ", ".join(kept + others)


class View(NamedTuple):
    """One rendering or crop of an item, and what is known of it.

    Attributes:
        image: RGB, of the size that the item's views have.
        captions: what it may be called.
        original_size: height and width of the whole image, before it was scaled and cropped; None if it is the same.
        crop_corner: top and left of the crop in the scaled image, in pixels.
        mask: where the loss counts, "L", as large as the image; None for everywhere.
        before: the image that this one is an edit of, RGB, as large; None where nothing was edited.
    """

    image: Image.Image
    captions: Captions
    original_size: tuple[int, int] | None = None
    crop_corner: tuple[int, int] = (0, 0)
    mask: Image.Image | None = None
    before: Image.Image | None = None


class CaptionedImages(Protocol):
    """A set of items, each seen through random views.

    Attributes:
        image_size: the side of the views if they are square, else that of a square of the area that they have at most.
    """

    image_size: int

    @property
    def views_vary(self) -> bool:
        """Whether two views of an item can differ."""
        ...

    def __len__(self) -> int: ...

    def bucket(self, index: int) -> tuple[int, int]:
        """Height and width of the views of item `index`."""
        ...

    def view(self, index: int, rng: random.Random) -> View:
        """Draw a view of item `index`."""
        ...

    def corpus(self) -> list[str]:
        """The captions that a tokenizer for this set is made from."""
        ...


class TrainingSet(CaptionedImages, Protocol):
    """A set that was opened from a recipe.

    Attributes:
        digest: changes with what is in it, as far as opening it has looked.
    """

    digest: str


def digest_of(parts: Iterable[object]) -> str:
    """A digest of what `repr` shows of some numbers, texts, bytes, and tuples of them, in their order."""
    total = hashlib.sha256()
    for part in parts:
        total.update(repr(part).encode("utf-8", "surrogatepass") + b"\0")
    return total.hexdigest()


def check_sides(data: CaptionedImages, factor: int) -> None:
    """Refuse views whose sides an autoencoder cannot divide by its `factor`.

    Raises:
        ConfigError: naming the first such side.
    """
    sides = (side for index in range(len(data)) for side in data.bucket(index))
    wrong = next((side for side in sides if side % factor), None)
    if wrong is not None:
        raise ConfigError(
            f"there are images of {wrong} pixels in height or width, and the autoencoder takes multiples of {factor}: "
            "choose one for data.image_size, or for data.bucket_step if there are buckets"
        )


def to_tensor(images: Sequence[Image.Image]) -> Tensor:
    """RGB images of one size to [B, 3, H, W] in -1..1, float32, channels_last."""
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return pixels.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)
