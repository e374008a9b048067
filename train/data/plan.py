"""Which samples a process computes in a step: the order and all randomness are functions of (seed, step, sample)."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from latentgen.train.data.order import Order, sample_rng


@dataclass(frozen=True)
class BatchPlan:
    """Which samples of which step one process computes together.

    Attributes:
        seed: the run's seed.
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
        """Standard normal noise [samples, *shape] in float32, independent for each purpose."""
        generators = (torch.Generator().manual_seed(rng.getrandbits(63)) for rng in self.rngs(purpose))
        return torch.stack([torch.randn(*shape, generator=generator) for generator in generators])


def plan_step(
    seed: int, step: int, *, batch_size: int, order: Order, parts: int, rank: int, processes: int
) -> list[BatchPlan]:
    """Split the global batch of a step over `processes` and into `parts` accumulated one after the other.

    The global batch is a function of (seed, step) alone, whatever the number of processes and parts. All plans are
    equally large if `batch_size` is a multiple of `parts * processes`, as the mean of their means needs it.
    """
    plans = []
    for part in range(parts):
        samples = tuple(range(part * processes + rank, batch_size, parts * processes))
        items = order.items(seed, step, batch_size, samples)
        plans.append(BatchPlan(seed, step, batch_size, samples, items))
    return plans
