"""Which views a run sees: fixed ones of every item, or new ones in every step."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch.utils.data import get_worker_info

from latentgen.train.data import BatchIndices, CaptionedDataset, Sample, sample_rng
from latentgen.train.data.image_checks import THREADS, in_threads

_DRAWN_AHEAD = 64
S = TypeVar("S")
T = TypeVar("T")

Change = Callable[[Sample, random.Random], Sample]


@dataclass(frozen=True)
class ViewSource:
    """Which views a run sees, the same ones in every process.

    Attributes:
        data: the images.
        per_item: how many fixed views of every item; 0 for new ones in every step.
        seed: the run's seed.
        change: what is done to every view, with random numbers of its own.
        random_change: whether it uses them.
    """

    data: CaptionedDataset
    per_item: int
    seed: int
    change: Change | None = None
    random_change: bool = True

    def __len__(self) -> int:
        return len(self.data) * max(1, self.per_item)

    def fixed(self, index: int) -> Sample:
        """A fixed view: those of one item follow each other."""
        item, number = divmod(index, self.per_item)
        view = self.data.sample(item, sample_rng(self.seed, "cached view", item, number))
        return view if self.change is None else self.change(view, self.change_rng(index))

    @property
    def distinct(self) -> range:
        """The fixed views that differ from the one before: of every item the first alone if nothing is random."""
        return range(0, len(self), self._alike)

    def place(self, index: int) -> int:
        """Which of `distinct` a fixed view is the same as."""
        return index // self._alike

    @property
    def _alike(self) -> int:
        """How many fixed views that follow each other are the same."""
        varies = self.data.is_random or (self.change is not None and self.random_change)
        return 1 if varies else self.per_item

    def drawn(self, indices: Sequence[int]) -> Iterator[tuple[int, Sample]]:
        """Each of `indices` with its fixed view; they are drawn a few at a time."""
        for start in range(0, len(indices), _DRAWN_AHEAD):
            part = indices[start : start + _DRAWN_AHEAD]
            yield from zip(part, _in_threads(self.fixed, part), strict=True)

    def change_rng(self, index: int) -> random.Random:
        """The generator that a fixed view is changed with."""
        return sample_rng(self.seed, "degradation", index)

    def fresh(self, plan: BatchIndices) -> list[Sample]:
        """A new view for each sample of a batch."""
        places = list(zip(plan.items, plan.rngs("view"), self.fresh_change_rngs(plan), strict=True))

        def draw(place: tuple[int, random.Random, random.Random]) -> Sample:
            item, rng, change_rng = place
            view = self.data.sample(item, rng)
            return view if self.change is None else self.change(view, change_rng)

        return _in_threads(draw, places)

    def fresh_change_rngs(self, plan: BatchIndices) -> list[random.Random]:
        """The generators that new views are changed with."""
        return list(plan.rngs("degradation"))


def _in_threads(draw: Callable[[S], T], places: Sequence[S]) -> list[T]:
    """`draw` of each place, several at a time; one after the other in a process that is one of many already."""
    if THREADS == 1 or len(places) == 1 or get_worker_info() is not None:
        return [draw(place) for place in places]
    return in_threads(draw, places)
