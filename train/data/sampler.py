"""Which items a step trains on, and all of its randomness, which depends only on (seed, step, sample).

Each step has images of one size.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from latentgen.train.data.dataset import CaptionedDataset

# How many shards are shuffled together, and so are read from at the same time.
SHARDS_TOGETHER = 8


def sample_rng(seed: int, *position: int | str) -> random.Random:
    """The generator of one position of a run, such as (step, sample); it depends only on the arguments."""
    return random.Random("/".join(map(str, (seed, *position))))


def shard_order(
    seed: int, epoch: int, counts: Sequence[int], *, together: int = SHARDS_TOGETHER, bucket: int = 0
) -> NDArray[np.int64]:
    """The order of the items in an epoch over shards that hold `counts` of them; it depends only on the arguments.

    The shards are shuffled, and then the items within each group of `together` consecutive shards, so that only the
    shards of one group are read at a time. Each `bucket`, where images have several sizes, has its own order.
    """
    generator = np.random.RandomState(sample_rng(seed, "shards", epoch, bucket).getrandbits(32))
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int64)
    shards = generator.permutation(len(counts))
    groups = []
    for first in range(0, len(shards), together):
        group = [starts[shard] + np.arange(counts[shard]) for shard in shards[first : first + together]]
        groups.append(generator.permutation(np.concatenate(group)))
    return np.concatenate(groups)


@runtime_checkable
class Sharded(Protocol):
    """A data set whose items are in shards, one after the other: `shard_counts` are how many each has."""

    shard_counts: tuple[int, ...]


class BucketSampler:
    """The items of every step.

    Items are grouped in buckets, whose images have one size and so make one tensor. Each bucket has its own endless
    shuffled sequence, in which every epoch has every item once; a step takes the next `batch_size` of one bucket.
    Buckets take turns: a round gives each of them turns in proportion to its items, evenly spread from a random start.
    So every item is seen equally often in the long run: exactly `batch_size` times in as many steps as there are items.

    No step needs the steps before it: rounds and epochs are computed on demand, in time proportional to their length.

    Args:
        buckets: the items of each, at least one bucket and none empty.
        shard_counts: for each bucket, how many of its consecutive items are in one shard, if there are
            shards; an epoch then reads from a few at a time.
    """

    def __init__(
        self, buckets: Sequence[Sequence[int]], shard_counts: Sequence[Sequence[int]] | None = None
    ) -> None:
        self._buckets = tuple(buckets)
        self._shard_counts = shard_counts
        counts = [len(bucket) for bucket in self._buckets]
        common = math.gcd(*counts)
        self._turns = tuple(count // common for count in counts)
        # Two of each bucket: a batch may end one epoch and begin the next.
        self._epoch = lru_cache(2 * len(counts))(self._shuffled)

    @classmethod
    def of(cls, data: CaptionedDataset, *, views: int = 1) -> BucketSampler:
        """The order of a data set with `views` views per item; those of item `i` are numbered from `i * views`."""
        sizes = [data.bucket(item) for item in range(len(data))]
        distinct = sorted(set(sizes))
        shards = data.shard_counts if isinstance(data, Sharded) else None
        if len(distinct) == 1:
            counts = None if shards is None else [[count * views for count in shards]]
            return cls([range(len(data) * views)], counts)
        members: dict[tuple[int, int], list[int]] = {size: [] for size in distinct}
        for item, size in enumerate(sizes):
            members[size] += range(item * views, (item + 1) * views)
        buckets = list(members.values())
        if shards is None:
            return cls(buckets)
        edges = np.concatenate([[0], np.cumsum(shards)]) * views
        return cls(buckets, [np.diff(np.searchsorted(bucket, edges)).tolist() for bucket in buckets])

    def __len__(self) -> int:
        """The number of items in an epoch."""
        return sum(map(len, self._buckets))

    def parts(self, size: int) -> Iterator[tuple[int, ...]]:
        """All items once, as they are numbered, at most `size` at a time and of one bucket."""
        for bucket in self._buckets:
            for start in range(0, len(bucket), size):
                yield tuple(bucket[start : start + size])

    def items(self, seed: int, step: int, batch_size: int, samples: Sequence[int]) -> tuple[int, ...]:
        """The items of some `samples` (positions within the global batch) of a step."""
        bucket, turn = self._turn(seed, step)
        members = self._buckets[bucket]
        places = (divmod(turn * batch_size + sample, len(members)) for sample in samples)
        return tuple(members[int(self._epoch(seed, epoch, bucket)[place])] for epoch, place in places)

    def _turn(self, seed: int, step: int) -> tuple[int, int]:
        """The bucket of a step, and how many turns it had before."""
        if len(self._buckets) == 1:
            return 0, step
        number, place = divmod(step, sum(self._turns))
        buckets, turns = _round(seed, number, self._turns)
        bucket = int(buckets[place])
        return bucket, number * self._turns[bucket] + int(turns[place])

    def _shuffled(self, seed: int, epoch: int, bucket: int) -> list[int] | NDArray[np.int64]:
        """The places within a bucket in the order of an epoch."""
        if self._shard_counts is not None:
            return shard_order(seed, epoch, self._shard_counts[bucket], bucket=bucket)
        places = list(range(len(self._buckets[bucket])))
        position = (epoch,) if len(self._buckets) == 1 else (epoch, bucket)
        sample_rng(seed, "epoch", *position).shuffle(places)
        return places


@lru_cache(maxsize=2)
def _round(seed: int, number: int, turns: tuple[int, ...]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The bucket of every step of a round, and the turn of this bucket within the round.

    A bucket of n turns has them at (k + start) / n of the round, k from 0, with a random start in 0..1.
    """
    starts = [sample_rng(seed, "round", number, bucket).random() for bucket in range(len(turns))]
    moments = [(np.arange(count) + start) / count for count, start in zip(turns, starts, strict=True)]
    order = np.argsort(np.concatenate(moments), kind="stable")
    buckets = np.repeat(np.arange(len(turns)), turns)[order]
    return buckets, np.concatenate([np.arange(count) for count in turns])[order]


@dataclass(frozen=True)
class BatchIndices:
    """The samples of an optimizer step (from 0) that one process computes together, and the item of each.

    `samples` are positions within the global batch, which has `batch_size` in all processes together.
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
    seed: int, step: int, *, batch_size: int, order: BucketSampler, parts: int, rank: int, processes: int
) -> list[BatchIndices]:
    """Split the global batch of a step over `processes` and into `parts` accumulated one after the other.

    The global batch depends only on (seed, step). If `batch_size` is a multiple of `parts * processes`, all plans have
    the same size, so that the mean of their means is the mean of the batch.
    """
    plans = []
    for part in range(parts):
        samples = tuple(range(part * processes + rank, batch_size, parts * processes))
        items = order.items(seed, step, batch_size, samples)
        plans.append(BatchIndices(seed, step, batch_size, samples, items))
    return plans
