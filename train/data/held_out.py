"""The images that a run learns from, and those that its validation loss is measured on."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

from latentgen.errors import DatasetError
from latentgen.train.config import TrainConfig
from latentgen.train.data import CaptionedImages, View, open_data, sample_rng


class Parts(NamedTuple):
    """The images to learn from, and those to measure on, if there are any."""

    training: CaptionedImages
    held_out: CaptionedImages | None


class Part:
    """Some of the items of a set, in the order of `items`; its tokenizer is that of the whole."""

    def __init__(self, whole: CaptionedImages, items: Sequence[int]) -> None:
        self.image_size = whole.image_size
        self.views_vary = whole.views_vary
        self._whole = whole
        self._items = tuple(items)

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


def open_parts(config: TrainConfig) -> Parts:
    """The data sets of a recipe.

    Of more images than the validation loss is measured on, which ones it is follows from their number alone.

    Raises:
        DatasetError: listing all that is wrong with a set.
    """
    data, held_out, validation = open_data(config.data), None, config.validation
    if config.held_out:
        data, held_out = split(data, config.held_out)
    elif validation is not None and validation.data is not None:
        held_out = open_data(validation.data)
        held_out = Part(held_out, _shuffled(len(held_out)))
    if validation is not None and held_out is not None:
        held_out = Part(held_out, range(min(validation.loss_images, len(held_out))))
    return Parts(data, held_out)


def split(data: CaptionedImages, share: float) -> tuple[CaptionedImages, CaptionedImages]:
    """What is trained on, and the `share` that is kept out: at least one image, the same whatever a run's seed is.

    Which ones follows from their number alone, by a shuffle, so that what comes in a rhythm (frames of one scene, views
    of one thing) is not kept out in step with it.

    Raises:
        DatasetError: there are not two images.
    """
    count = len(data)
    if count < 2:
        raise DatasetError(
            f"held_out is {share:g} of {count} images, and at least one must be left to train on"
        )
    order = _shuffled(count)
    kept = max(1, round(share * count))
    return Part(data, sorted(order[kept:])), Part(data, order[:kept])


def _shuffled(count: int) -> list[int]:
    order = list(range(count))
    sample_rng(0, "held out").shuffle(order)
    return order
