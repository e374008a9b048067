"""Measures free memory, and returns unused memory of the process to the system where that is possible."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from latentgen.memory import on_device

_CGROUP = Path("/sys/fs/cgroup")
_LIBC: Any = ctypes.CDLL(None) if sys.platform == "linux" else None
_MADV_PAGEOUT = 21  # from Linux' mman.h


def available_bytes(device: torch.device) -> int:
    """Free memory of a device; on the host, this process's share of it if several processes run there."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = min(psutil.virtual_memory().available, _free_in_container())
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _free_in_container() -> int:
    """Free memory under the container's limit; file caches that it may drop count as free."""
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return sys.maxsize
    return sys.maxsize if limit == "max" else int(limit) - used + int(stat.get("inactive_file", 0))


def release_freed_memory() -> None:
    """Let the C library return freed memory to the system, such as weights before they were converted."""
    if hasattr(_LIBC, "malloc_trim"):
        _LIBC.malloc_trim(0)


def page_out(module: nn.Module) -> None:
    """Return the memory pages of an idle network on the CPU to the system; they come back on use.

    Pages that are mapped from a file are read from it again, others from the swap space, without which they stay.
    """
    if not hasattr(_LIBC, "madvise"):
        return
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.device.type == "cpu":
            storage = tensor.untyped_storage()
            first = -(-storage.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
            size = storage.data_ptr() + storage.nbytes() - first
            if size > 0:
                _LIBC.madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), _MADV_PAGEOUT)


@contextmanager
def temporarily_on(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Run a network on `device` that is otherwise idle on the CPU; afterwards its memory is returned to the system."""
    with on_device(module, device, offload=True):
        yield
    page_out(module)
