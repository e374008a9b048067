"""The images that a run learns from, and those that its validation loss is measured on."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from latentgen.errors import DatasetError
from latentgen.train.config import TrainConfig
from latentgen.train.data import CaptionedImages, View, open_data, sample_rng
from latentgen.train.data.order import Sharded


class Parts(NamedTuple):
    """The images to learn from, and those to measure on, if there are any; `digest` is that of the recipe's `data`."""

    training: CaptionedImages
    held_out: CaptionedImages | None
    digest: str


@runtime_checkable
class Repeating(Protocol):
    """A data set of which several items may show one image: `images` has a number for the image of each item."""

    @property
    def images(self) -> Sequence[int]:
        """Numbers that are the same where the image is."""
        ...


class Part:
    """Some of the items of a set, in the order of `items`; its tokenizer is that of the whole."""

    def __init__(self, whole: CaptionedImages, items: Sequence[int]) -> None:
        self.image_size = whole.image_size
        self.views_vary = whole.views_vary
        self._whole = whole
        self._items = tuple(items)

    @classmethod
    def in_order(cls, whole: CaptionedImages, items: Sequence[int]) -> Part:
        """A part whose items are as sorted as those of the whole, so that shards stay shards."""
        return (
            ShardedPart(whole, items, whole.shard_counts) if isinstance(whole, Sharded) else cls(whole, items)
        )

    def __len__(self) -> int:
        return len(self._items)

    def view(self, index: int, rng: random.Random) -> View:
        """Draw a view of item `index` of this part."""
        return self._whole.view(self._items[index], rng)

    def bucket(self, index: int) -> tuple[int, int]:
        """Height and width of the views of an item."""
        return self._whole.bucket(self._items[index])

    def corpus(self) -> list[str]:
        """The captions of the whole set."""
        return self._whole.corpus()


class ShardedPart(Part):
    """Some of the items of a set in shards, sorted; `shard_counts` are how many of them lie in each."""

    def __init__(self, whole: CaptionedImages, items: Sequence[int], shard_counts: Sequence[int]) -> None:
        super().__init__(whole, items)
        edges = np.concatenate([[0], np.cumsum(shard_counts)])
        self.shard_counts: tuple[int, ...] = tuple(np.diff(np.searchsorted(items, edges)).tolist())


def open_parts(config: TrainConfig) -> Parts:
    """The data sets of a recipe.

    Of more images than the validation loss is measured on, which ones it is follows from their number alone.

    Raises:
        DatasetError: listing all that is wrong with a set.
    """
    whole, held_out, validation = open_data(config.data), None, config.validation
    data: CaptionedImages = whole
    if config.validation_fraction:
        data, held_out = split(whole, config.validation_fraction)
    elif validation is not None and validation.data is not None:
        held_out = open_data(validation.data)
        held_out = Part(held_out, [items[0] for items in _images(held_out)])
    if validation is not None and held_out is not None:
        held_out = Part(held_out, range(min(validation.loss_images, len(held_out))))
    return Parts(data, held_out, whole.digest)


def split(data: CaptionedImages, share: float) -> tuple[CaptionedImages, CaptionedImages]:
    """What is trained on, and the `share` that is kept out: at least one image, the same whatever a run's seed is.

    Which ones follows from their number alone, by a shuffle, so that what comes in a rhythm (frames of one scene, views
    of one thing) is not kept out in step with it. An image that is several items is kept out with all of them, of which
    the first is measured on.

    Raises:
        DatasetError: there are not two images.
    """
    images = _images(data)
    count = len(images)
    if count < 2:
        raise DatasetError(
            f"validation_fraction is {share:g} of {count} images, and at least one must be left to train on"
        )
    kept = max(1, round(share * count))
    training = sorted(item for items in images[kept:] for item in items)
    return Part.in_order(data, training), Part(data, [items[0] for items in images[:kept]])


def _images(data: CaptionedImages) -> list[list[int]]:
    """The items of each image, the images shuffled."""
    items: dict[int, list[int]] = {}
    for item, image in enumerate(data.images if isinstance(data, Repeating) else range(len(data))):
        items.setdefault(image, []).append(item)
    images = list(items.values())
    sample_rng(0, "held out").shuffle(images)
    return images
