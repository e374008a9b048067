"""The order of items: every step of one size, every item equally often, any step without those before it."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from latentgen.train.data import (
    BatchIndices,
    BucketSampler,
    CaptionedDataset,
    Captions,
    Sample,
    plan_step,
    sample_rng,
    to_tensor,
)

SIZES = {"s": (64, 64), "w": (48, 80), "h": (80, 48)}


class Pictures:
    """A data set of which nothing but the buckets matters: one letter for the size of each item."""

    image_size = 64
    is_random = False

    def __init__(self, letters: str) -> None:
        self._sizes = [SIZES[letter] for letter in letters]

    def __len__(self) -> int:
        return len(self._sizes)

    def bucket(self, index: int) -> tuple[int, int]:
        return self._sizes[index]

    def sample(self, index: int, rng: random.Random) -> Sample:
        raise NotImplementedError

    def captions(self) -> list[str]:
        raise NotImplementedError


def batches(
    order: BucketSampler, steps: Sequence[int], batch_size: int, seed: int = 3
) -> list[tuple[int, ...]]:
    return [order.items(seed, step, batch_size, range(batch_size)) for step in steps]


def orders(counts: Sequence[int]) -> tuple[BucketSampler, list[int]]:
    """An order with buckets of these many items, and the bucket of every item."""
    members = [number for number, count in enumerate(counts) for _ in range(count)]
    groups = [
        [item for item, number in enumerate(members) if number == bucket] for bucket in range(len(counts))
    ]
    return BucketSampler(groups), members


def test_one_bucket_has_the_order_of_the_runs_before_there_were_buckets():
    # Epoch by epoch, shuffled by Python's generator of the name "seed/epoch/number".
    expected: list[int] = []
    for epoch in range(8):
        items = list(range(10))
        random.Random(f"3/epoch/{epoch}").shuffle(items)
        expected += items
    data = Pictures("sssss")
    shown = [item for batch in batches(BucketSampler.of(data, views=2), range(20), 4) for item in batch]
    assert shown == expected
    assert shown[:10] == [9, 6, 3, 7, 5, 2, 0, 1, 4, 8]


def test_views_are_numbered_by_item():
    data: CaptionedDataset = Pictures("swsw")
    buckets = Counter(frozenset(batch) for batch in batches(BucketSampler.of(data, views=3), range(40), 6))
    assert buckets == {frozenset({0, 1, 2, 6, 7, 8}): 20, frozenset({3, 4, 5, 9, 10, 11}): 20}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 7), st.integers(0, 5))
def test_order_over_buckets(counts: list[int], batch_size: int, seed: int):
    order, members = orders(counts)
    total = sum(counts)
    shown = batches(order, range(total), batch_size, seed)
    turns = [{members[item] for item in batch} for batch in shown]
    assert all(len(buckets) == 1 for buckets in turns), "every batch is of one bucket"
    seen = Counter(item for batch in shown for item in batch)
    assert seen == dict.fromkeys(range(total), batch_size), "every item equally often"
    # Within a bucket no item comes for the (n+1)th time before every other has come n times.
    for bucket, count in enumerate(counts):
        sequence = [item for batch in shown for item in batch if members[item] == bucket]
        epochs = [sequence[start : start + count] for start in range(0, len(sequence), count)]
        assert all(len(set(epoch)) == count for epoch in epochs)
    # At no time is a bucket further from its share of the turns than the number of buckets.
    for bucket, count in enumerate(counts):
        had = 0
        for step, buckets in enumerate(turns, start=1):
            had += bucket in buckets
            assert abs(had - step * count / total) <= len(counts)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=5), st.randoms(use_true_random=False))
def test_any_step_is_the_same_without_those_before_it(counts: list[int], rng: random.Random):
    steps = list(range(60))
    whole = dict(zip(steps, batches(orders(counts)[0], steps, 4), strict=True))
    rng.shuffle(steps)
    order, _ = orders(counts)
    for step in steps[:20]:
        (alone,) = batches(orders(counts)[0], [step], 4)
        (later,) = batches(order, [step], 4)
        assert alone == later == whole[step]
        assert order.items(3, step, 4, (1, 3)) == (whole[step][1], whole[step][3])


def test_orders_differ_between_seeds_epochs_and_buckets():
    order, _ = orders([50, 50])
    first = batches(order, range(8), 25)
    assert first != batches(order, range(8), 25, seed=4)
    low, high = (
        [item % 50 for batch in first for item in batch if item // 50 == bucket] for bucket in (0, 1)
    )
    assert low[:50] != low[50:]
    assert low != high
    assert sorted(low[:50]) == sorted(high[50:]) == list(range(50))


def test_a_late_step_of_a_large_set_costs_no_replay(monkeypatch: pytest.MonkeyPatch):
    from latentgen.train.data import sampler as module

    shuffles: list[tuple[int | str, ...]] = []
    original = module.sample_rng

    def sample_rng(seed: int, *position: int | str) -> random.Random:
        shuffles.append(position)
        return original(seed, *position)

    monkeypatch.setattr(module, "sample_rng", sample_rng)
    order, _ = orders([300, 200, 100])
    for step in range(10**6, 10**6 + 50):
        order.items(8, step, 4, range(4))
    # 9 rounds of 6 steps with a random start for each bucket, and 200 items: one or two epochs of each bucket.
    assert sum(position[0] == "round" for position in shuffles) <= 9 * 3 + 3
    assert sum(position[0] == "epoch" for position in shuffles) <= 6


ORDER, BATCH = BucketSampler([range(6), range(6, 10)]), 12


def plans(step: int, parts: int = 1, processes: int = 1, seed: int = 3) -> list[BatchIndices]:
    """All plans of a step, of every process."""
    return [
        plan
        for rank in range(processes)
        for plan in plan_step(
            seed, step, batch_size=BATCH, order=ORDER, parts=parts, rank=rank, processes=processes
        )
    ]


@pytest.mark.parametrize(("parts", "processes"), [(2, 1), (1, 3), (2, 3), (3, 2), (12, 1)])
def test_splitting_gives_the_same_global_batch(parts: int, processes: int):
    (whole,) = plans(step=4)
    noise = dict(zip(whole.samples, whole.noise((2, 3), "noise"), strict=True))
    drawn = dict(zip(whole.samples, [rng.random() for rng in whole.rngs("view")], strict=True))
    split = plans(4, parts, processes)
    assert len(split) == parts * processes
    assert {len(plan.samples) for plan in split} == {BATCH // (parts * processes)}
    assert sorted(sample for plan in split for sample in plan.samples) == list(range(BATCH))
    for plan in split:
        assert plan.items == tuple(whole.items[sample] for sample in plan.samples)
        assert [rng.random() for rng in plan.rngs("view")] == [drawn[sample] for sample in plan.samples]
        for sample, row in zip(plan.samples, plan.noise((2, 3), "noise"), strict=True):
            assert torch.equal(row, noise[sample])


def test_randomness_depends_on_seed_purpose_step_and_sample_and_on_nothing_else():
    positions = list(itertools.product((0, 1), "ab", (0, 11), (0, 1)))
    draws = [sample_rng(*position).random() for position in positions]
    assert len(set(draws)) == len(positions)
    random.seed(1)
    torch.manual_seed(1)
    assert draws == [sample_rng(*position).random() for position in positions]
    assert sample_rng(0, 1, 11).random() != sample_rng(0, 11, 1).random()


def test_noise_is_standard_normal_and_new_in_each_step():
    noise = torch.cat([plans(step)[0].noise((50, 50), "noise") for step in (0, 1)])
    assert noise.dtype == torch.float32
    assert noise.mean().item() == pytest.approx(0, abs=0.02)
    assert noise.std().item() == pytest.approx(1, abs=0.02)
    assert len({row.sum().item() for row in noise}) == 2 * BATCH


def test_captions_are_drawn_by_weight():
    captions = Captions(("often", "seldom", "never"), (3.0, 1.0, 0.0))
    drawn = Counter(captions.draw(random.Random(seed)) for seed in range(2000))
    assert drawn["often"] / 2000 == pytest.approx(0.75, abs=0.04)
    assert drawn["often"] + drawn["seldom"] == 2000


def test_pixels_become_channels_last_tensors():
    levels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3) * 15
    tensor = to_tensor([Image.fromarray(levels), Image.new("RGB", (3, 2), "white")])
    assert tensor.shape == (2, 3, 2, 3)
    assert tensor.dtype == torch.float32
    assert tensor.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_allclose(tensor[0].permute(1, 2, 0), levels / 127.5 - 1, atol=1e-6)
    assert (tensor[1] == 1).all()
    assert to_tensor([Image.new("RGB", (1, 1))]).unique().tolist() == [-1]
