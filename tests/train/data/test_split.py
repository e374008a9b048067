"""What is held out is held out as whole images, and leaves the others in the order that their set asks for."""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from latentgen.train.data import BucketSampler, CaptionedDataset, Sample, open_splits, split
from latentgen.train.data.sampler import Sharded, shard_order
from tests.train.recipes import MakeRecipe


class Numbers:
    """A data set whose views tell the number of the item."""

    image_size = 8
    is_random = False

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def bucket(self, index: int) -> tuple[int, int]:
        return (8, 8) if index % 3 else (4, 16)

    def sample(self, index: int, rng: random.Random) -> Sample:
        raise AssertionError(index)

    def captions(self) -> list[str]:
        raise NotImplementedError


class Repeats(Numbers):
    """As Numbers, of several items to an image."""

    def __init__(self, images: Sequence[int]) -> None:
        super().__init__(len(images))
        self.images = images


class Shards(Numbers):
    """As Numbers, in shards."""

    def __init__(self, *shard_counts: int) -> None:
        super().__init__(sum(shard_counts))
        self.shard_counts = shard_counts


def numbers(part: CaptionedDataset) -> list[int]:
    found = []
    for item in range(len(part)):
        with pytest.raises(AssertionError) as caught:
            part.sample(item, random.Random(0))
        found.append(int(str(caught.value)))
    return found


def captions(part: CaptionedDataset) -> list[str]:
    return [part.sample(item, random.Random(0)).captions.texts[0] for item in range(len(part))]


def test_which_are_held_out_follows_from_their_number():
    training, held_out = (numbers(part) for part in split(Numbers(10), 0.3))
    order = list(range(10))
    random.Random("0/held out").shuffle(order)
    assert (training, held_out) == (sorted(order[3:]), order[:3])


def test_an_image_is_held_out_with_all_of_its_items():
    images = [0, 0, 0, 1, 2, 2, 1, 3, 0, 4]
    parts = split(Repeats(images), 0.4)
    training, held_out = (numbers(part) for part in parts)
    kept = [images[item] for item in held_out]
    assert len(set(kept)) == len(kept) == 2
    assert held_out == [images.index(image) for image in kept], "each is measured once"
    assert training == [item for item in range(10) if images[item] not in kept]


@pytest.mark.parametrize("kind", ["imagefolder", "kohya"])
def test_repeats_do_not_leak(kind: str, autoencoder_recipe: MakeRecipe, image_folder: Path, tmp_path: Path):
    fields = f"{{kind: imagefolder, path: {image_folder}, image_size: 16, repeats: 10}}"
    if kind == "kohya":
        shutil.copytree(image_folder, tmp_path / "img" / "10_disc")
        shutil.copytree(image_folder, tmp_path / "img" / "3_again")
        fields = f"{{kind: kohya, path: {tmp_path / 'img'}, image_size: 16}}"
    parts = open_splits(
        autoencoder_recipe(f"data={fields}", "validation_fraction=0.34", "validation.loss_every=2")
    )
    assert parts.validation is not None
    measured = captions(parts.validation)
    assert len(set(measured)) == len(measured) == 2
    trained = captions(parts.training)
    assert len(trained) == 4 * (10 if kind == "imagefolder" else 13)
    assert not set(measured) & set(trained)


def test_repeats_of_data_for_validation_are_measured_once(autoencoder_recipe: MakeRecipe, image_folder: Path):
    data = f"{{kind: imagefolder, path: {image_folder}, image_size: 16, repeats: 10}}"
    parts = open_splits(autoencoder_recipe(f"validation.data={data}"))
    assert parts.validation is not None
    assert len(set(captions(parts.validation))) == len(parts.validation) == 6


def test_shards_stay_shards():
    training, held_out = split(Shards(5, 0, 7, 8, 4), 0.25)
    items = numbers(training)
    assert isinstance(training, Sharded)
    assert not isinstance(held_out, Sharded)
    bounds = [(0, 5), (5, 5), (5, 12), (12, 20), (20, 24)]
    assert training.shard_counts == tuple(sum(a <= item < b for item in items) for a, b in bounds)
    # The order of an epoch is that of the same shards, without what is held out.
    order = BucketSampler.of(training)
    squares = [place for place, item in enumerate(items) if item % 3]
    shown = [
        item
        for step in range(60)
        for item in order.items(0, step, 1, (0,))
        if training.bucket(item) == (8, 8)
    ]
    counts = [sum(a <= items[place] < b for place in squares) for a, b in bounds]
    expected = [squares[place] for place in shard_order(0, 0, counts, bucket=1)]
    assert shown[: len(squares)] == expected
