"""Work that the processes of a run share before training begins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.utils.data import get_worker_info

from latentgen.errors import ConfigError

T = TypeVar("T")


def own_share(items: Sequence[T]) -> Sequence[T]:
    """What this process does of a list that all processes have alike; all of it if there is but one."""
    if not _is_distributed():
        return items
    return items[dist.get_rank() :: dist.get_world_size()]


def gather(items: Sequence[T]) -> list[T]:
    """The lists of all processes, one after the other, which waits until each has come here with its own."""
    if not _is_distributed():
        return list(items)
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, list(items))
    return [item for part in parts for item in part]


def refuse_in_worker(device: torch.device, what: str) -> None:
    """Raise ConfigError in a process that prepares batches if `what` runs on an accelerator, which it cannot use."""
    if device.type != "cpu" and get_worker_info() is not None:
        raise ConfigError(
            f"{what} on {device.type}, which the processes that prepare batches cannot use; set workers to 0"
        )


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()
