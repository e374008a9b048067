"""A training set: captioned images, each seen through random views; subsets and validation splits of it."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from latentgen.errors import ConfigError, DatasetError
from latentgen.train.data.sampler import Sharded, sample_rng


class Captions(NamedTuple):
    """The possible captions of one image, drawn by weight.

    With `shuffle_after` the comma-separated parts of a caption, except for the first `shuffle_after`, are shuffled each
    time it is drawn, as in kohya's trainers.
    """

    texts: tuple[str, ...]
    weights: tuple[float, ...]
    shuffle_after: int | None = None

    def draw(self, rng: random.Random) -> str:
        """One of the captions, drawn by weight."""
        text = rng.choices(self.texts, weights=self.weights)[0]
        if self.shuffle_after is None:
            return text
        parts = [part.strip() for part in text.split(",")]
        first, others = parts[: self.shuffle_after], parts[self.shuffle_after :]
        rng.shuffle(others)
        return ", ".join(first + others)


class Sample(NamedTuple):
    """One rendering or crop of an item.

    Attributes:
        image: RGB, of the size that the item's views have.
        captions: its possible captions.
        original_size: height and width of the whole image, before it was scaled and cropped; None if it is the same.
        crop_corner: top and left of the crop in the scaled image, in pixels.
        mask: where the loss counts, "L", as large as the image; None for everywhere.
        before: the image before the edit, RGB, of the same size; None if `image` is not an edit.
    """

    image: Image.Image
    captions: Captions
    original_size: tuple[int, int] | None = None
    crop_corner: tuple[int, int] = (0, 0)
    mask: Image.Image | None = None
    before: Image.Image | None = None


class CaptionedDataset(Protocol):
    """A set of items, each seen through random views.

    Attributes:
        image_size: the side of square views; for other views, the side of a square with their largest area.
    """

    image_size: int

    @property
    def is_random(self) -> bool:
        """Whether two views of an item can differ."""
        ...

    def __len__(self) -> int: ...

    def bucket(self, index: int) -> tuple[int, int]:
        """Height and width of the views of item `index`."""
        ...

    def sample(self, index: int, rng: random.Random) -> Sample:
        """Draw a view of item `index`."""
        ...

    def captions(self) -> list[str]:
        """All captions, for a tokenizer."""
        ...


class TrainingSet(CaptionedDataset, Protocol):
    """A set that was opened from a recipe.

    Attributes:
        digest: a digest of the content that was read when it was opened.
    """

    digest: str


def digest_of(parts: Iterable[object]) -> str:
    """A digest of the `repr` of some numbers, texts, bytes, and tuples of them, in their order."""
    total = hashlib.sha256()
    for part in parts:
        total.update(repr(part).encode("utf-8", "surrogatepass") + b"\0")
    return total.hexdigest()


def check_sides(data: CaptionedDataset, factor: int) -> None:
    """Raise an error if a side of a view is not a multiple of the autoencoder's `factor`.

    Raises:
        ConfigError: naming the first such side.
    """
    sides = (side for index in range(len(data)) for side in data.bucket(index))
    wrong = next((side for side in sides if side % factor), None)
    if wrong is not None:
        raise ConfigError(
            f"a side of {wrong} pixels is not a multiple of {factor}, which the autoencoder requires: change "
            "data.image_size or data.bucket_step"
        )


def to_tensor(images: Sequence[Image.Image]) -> Tensor:
    """RGB images of one size to [B, 3, H, W] in -1..1, float32, channels_last."""
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return pixels.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


@runtime_checkable
class Repeating(Protocol):
    """A data set in which several items may share an image: `images` holds the number of each item's image."""

    images: Sequence[int]


class Subset:
    """Some `items` of a data set, in this order; `captions` returns those of the whole set, for the same tokenizer."""

    def __init__(self, whole: CaptionedDataset, items: Sequence[int]) -> None:
        self.image_size = whole.image_size
        self.is_random = whole.is_random
        self._whole = whole
        self._items = tuple(items)

    def __len__(self) -> int:
        return len(self._items)

    def sample(self, index: int, rng: random.Random) -> Sample:
        """Draw a view of item `index` of this subset."""
        return self._whole.sample(self._items[index], rng)

    def bucket(self, index: int) -> tuple[int, int]:
        """Height and width of the views of an item."""
        return self._whole.bucket(self._items[index])

    def captions(self) -> list[str]:
        """The captions of the whole set."""
        return self._whole.captions()


class ShardedSubset(Subset):
    """Some `items` of a set in shards, sorted; `shard_counts` are how many of them are in each shard."""

    def __init__(self, whole: CaptionedDataset, items: Sequence[int], shard_counts: Sequence[int]) -> None:
        super().__init__(whole, items)
        edges = np.concatenate([[0], np.cumsum(shard_counts)])
        self.shard_counts: tuple[int, ...] = tuple(np.diff(np.searchsorted(items, edges)).tolist())


def split(data: CaptionedDataset, fraction: float) -> tuple[CaptionedDataset, CaptionedDataset]:
    """The items to train on, and one item of each validation image, of which there is at least one.

    The validation images are chosen by a shuffle that depends only on the number of images, so that periodic data
    (frames of one scene, views of one object) is not sampled at its period. None of their items is trained on.

    Raises:
        DatasetError: there are fewer than two images.
    """
    images = _shuffled_images(data)
    count = len(images)
    if count < 2:
        raise DatasetError(f"validation_fraction={fraction:g} needs at least 2 images; there are {count}")
    held_out = max(1, round(fraction * count))
    items = sorted(item for image in images[held_out:] for item in image)
    validation = Subset(data, [image[0] for image in images[:held_out]])
    if isinstance(data, Sharded):
        return ShardedSubset(data, items, data.shard_counts), validation
    return Subset(data, items), validation


def unique_items(data: CaptionedDataset) -> list[int]:
    """The first item of each image, shuffled."""
    return [image[0] for image in _shuffled_images(data)]


def _shuffled_images(data: CaptionedDataset) -> list[list[int]]:
    """The items of each image, the images shuffled."""
    items: dict[int, list[int]] = {}
    for item, image in enumerate(data.images if isinstance(data, Repeating) else range(len(data))):
        items.setdefault(image, []).append(item)
    images = list(items.values())
    sample_rng(0, "held out").shuffle(images)
    return images
