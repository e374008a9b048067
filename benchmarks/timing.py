"""Fair timing of peers: interleaved in one process, so that a busy machine slows all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

Work = Callable[[], object]


def interleaved(
    work: Mapping[str, Work],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
    summary: Callable[[Sequence[float]], float] = statistics.median,
) -> dict[str, float]:
    """The median seconds of each piece of work over `rounds`, taken in turn after one warm-up each.

    With `time.process_time` for a clock, other programs on a busy machine do not count but for the caches that they
    empty, so that `min` is the fairer summary.
    """
    for run in work.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for round_number in range(rounds):
        # The order turns, so that no one always follows the same neighbor.
        names = list(work)[round_number % len(work) :] + list(work)[: round_number % len(work)]
        for name in names:
            _wait()
            start = clock()
            work[name]()
            _wait()
            seconds[name].append(clock() - start)
    return {name: summary(taken) for name, taken in seconds.items()}


def report(title: str, medians: Mapping[str, float], *, peers: str) -> None:
    """Print each median, and its ratio to the best of those whose names begin with `peers`."""
    best = min(seconds for name, seconds in medians.items() if name.startswith(peers))
    print(title)
    for name, seconds in medians.items():
        print(f"  {name:32} {seconds * 1e3:10.1f} ms   {seconds / best:5.2f} of {peers} at its best")


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
