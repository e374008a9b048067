"""The order of samples and their randomness: functions of (seed, step, sample), however the work is split."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from latentgen.train.data import BatchPlan, Captions, Order, plan_step, sample_rng, to_tensor

ORDER, BATCH = Order([range(6), range(6, 10)]), 12


def plans(step: int, parts: int = 1, processes: int = 1, seed: int = 3) -> list[BatchPlan]:
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
    positions = [
        (seed, purpose, step, sample)
        for seed in (0, 1)
        for purpose in "ab"
        for step in (0, 11)
        for sample in (0, 1)
    ]
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
