"""Batches in the order of their plans, prepared ahead of the training process by worker processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from latentgen.errors import ConfigError, LatentgenError, LostProcessError
from latentgen.train.data import BatchIndices, Sample
from latentgen.train.objectives.base import Objective

PlannedBatch = tuple[BatchIndices, tuple[Tensor, ...]]
_Loaded = tuple[BatchIndices, list[Sample] | None, tuple[Tensor, ...] | None]


@contextmanager
def load_batches(
    objective: Objective, plans: Iterable[BatchIndices], *, workers: int, pin_memory: bool
) -> Iterator[Iterator[PlannedBatch]]:
    """Each plan with its batch, on the CPU; the workers are stopped when the block ends, even with an error.

    A batch is a function of its plan, so workers change the speed only. They are forked: each shares the objective as
    it is now, networks included, without a copy, and uses no accelerator. The part that needs one runs in this process:
    `batch`, with what a worker's `prefetch` has returned. With `pin_memory` copies to an accelerator are fast.

    Raises:
        ConfigError: this system cannot fork.
        LostProcessError: a worker died.
    """
    if "fork" not in multiprocessing.get_all_start_methods():
        raise ConfigError(f"workers is {workers}, but this system cannot fork processes; set workers to 0")
    # Tokenizers read this at the fork; otherwise they warn about threads that workers do not have.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    loader = DataLoader(
        _LoadedBatches(objective),
        batch_size=None,
        sampler=plans,
        num_workers=workers,
        collate_fn=lambda item: item,
        pin_memory=pin_memory,
        worker_init_fn=_ignore_stop_signals,
        multiprocessing_context="fork",
    )
    items: Any = None
    try:
        items = iter(loader)
        yield _finished_batches(objective, items)
    except RuntimeError as error:
        # The handler of SIGCHLD raises it, so it can come from anywhere in the block, even from `iter`.
        if not _is_worker_death(error):
            raise
        raise _lost_worker(error) from error
    finally:
        # Not left to the garbage collector: a traceback may hold the iterator until Python waits for its processes.
        _shut_down(items)


def _finished_batches(
    objective: Objective, items: Iterator[_Loaded | LatentgenError]
) -> Iterator[PlannedBatch]:
    """The batches from the workers; errors that they send are raised here."""
    while True:
        try:
            item = next(items)
        except StopIteration:
            return
        except (EOFError, ConnectionError) as error:  # the worker died while sending a tensor
            raise _lost_worker(error) from error
        if isinstance(item, LatentgenError):
            raise item
        plan, views, batch = item
        yield plan, objective.batch(plan, views) if batch is None else batch


def _shut_down(items: Any) -> None:
    try:
        if items is not None:
            items._shutdown_workers()
    except RuntimeError as error:
        if not _is_worker_death(error):
            raise


def _is_worker_death(error: RuntimeError) -> bool:
    return str(error).startswith("DataLoader worker")


def _lost_worker(error: Exception) -> LostProcessError:
    return LostProcessError(
        f"a data-loading worker died ({error or type(error).__name__}); the last checkpoint is intact: resume with "
        "fewer workers if memory ran out (/dev/shm counts)"
    )


class _LoadedBatches(Dataset[_Loaded | LatentgenError]):
    """The workers' part of batches, indexed by plan; errors of the library are returned, to be raised unchanged."""

    def __init__(self, objective: Objective) -> None:
        self._objective = objective

    def __getitem__(self, index: Any) -> _Loaded | LatentgenError:
        try:
            views = self._objective.prefetch(index)
            return index, views, self._objective.batch(index) if views is None else None
        except LatentgenError as error:
            return error


def _ignore_stop_signals(worker: int) -> None:
    """Ctrl-C, and often SIGTERM, reach every process of a group; the parent needs its workers until it has stopped."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
