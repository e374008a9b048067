"""Batches in the order of their plans, prepared where they are used or ahead of it by worker processes."""

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
from latentgen.train.data import BatchPlan
from latentgen.train.objectives.base import Objective

PlannedBatch = tuple[BatchPlan, tuple[Tensor, ...]]


@contextmanager
def prepared_batches(
    objective: Objective, plans: Iterable[BatchPlan], *, workers: int, pin_memory: bool
) -> Iterator[Iterator[PlannedBatch]]:
    """Each plan with its batch, on the CPU; the workers end with the block, however it ends.

    A batch is a function of its plan, so the workers change nothing but the time. They are forked: each sees the
    objective as it is now without copying it, networks included, and touches no accelerator. What the objective leaves
    to the process that trains is done when a batch is asked for.

    Args:
        objective: whose `batch` is called, or in workers `draw` and after it, here, `finish`.
        plans: read a few ahead of the batches.
        workers: how many processes; 0 prepares each batch when it is asked for.
        pin_memory: whether to put the batches where an accelerator reads them fastest; for workers alone.

    Raises:
        ConfigError: there are to be workers on a system that cannot fork.
        LostProcessError: a worker died.
        LatentgenError: of any kind, from the objective.
    """
    if not workers:
        yield ((plan, objective.batch(plan)) for plan in plans)
        return
    if "fork" not in multiprocessing.get_all_start_methods():
        raise ConfigError(f"workers is {workers}, but this system cannot fork processes; set workers to 0")
    # Read by the tokenizers at the fork, who warn of threads that the workers would not have.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    loader = DataLoader(
        _Batches(objective),
        batch_size=None,
        sampler=plans,
        num_workers=workers,
        collate_fn=_unchanged,
        pin_memory=pin_memory,
        worker_init_fn=_leave_signals_to_the_parent,
        multiprocessing_context="fork",
    )
    loaded: Any = None
    try:
        loaded = iter(loader)
        yield _received(objective, loaded)
    except RuntimeError as error:
        # Raised by the handler of SIGCHLD, so from anywhere in the block, its very beginning included.
        if not _tells_of_a_death(error):
            raise
        raise _death(error) from error
    finally:
        # Not left to the garbage collector: a traceback may hold the iterator until Python waits for its processes.
        _stop(loaded)


def _received(
    objective: Objective, loaded: Iterator[tuple[BatchPlan, Any] | LatentgenError]
) -> Iterator[PlannedBatch]:
    """The batches out of what the workers send; errors among it are raised here."""
    while True:
        try:
            item = next(loaded)
        except StopIteration:
            return
        except (EOFError, ConnectionError) as error:  # it died while it handed over a tensor
            raise _death(error) from error
        if isinstance(item, LatentgenError):
            raise item
        plan, drawn = item
        yield plan, objective.finish(plan, drawn)


def _stop(loaded: Any) -> None:
    try:
        if loaded is not None:
            loaded._shutdown_workers()
    except RuntimeError as error:
        if not _tells_of_a_death(error):
            raise


def _tells_of_a_death(error: RuntimeError) -> bool:
    return str(error).startswith("DataLoader worker")


def _death(error: Exception) -> LostProcessError:
    return LostProcessError(
        f"a process that prepares batches died ({error or type(error).__name__}); the last checkpoint is intact: "
        "resume with fewer workers if memory ran out (/dev/shm counts)"
    )


class _Batches(Dataset[tuple[BatchPlan, Any] | LatentgenError]):
    """What is drawn of batches, by their plans.

    An error that the library raises on purpose is handed over, to be raised as it is.
    """

    def __init__(self, objective: Objective) -> None:
        self._objective = objective

    def __getitem__(self, index: Any) -> tuple[BatchPlan, Any] | LatentgenError:
        try:
            return index, self._objective.draw(index)
        except LatentgenError as error:
            return error


def _unchanged(item: Any) -> Any:
    return item


def _leave_signals_to_the_parent(worker: int) -> None:
    """Ctrl-C, and many a SIGTERM, reach every process of a group; the parent needs its workers until it has stopped."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
