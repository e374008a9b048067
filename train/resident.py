"""What of its memory a process hands back to the system. Nothing happens where the C library or kernel cannot."""

from __future__ import annotations

import ctypes
import mmap
import sys
from typing import Any

from torch import nn

_LIBRARY: Any = ctypes.CDLL(None) if sys.platform == "linux" else None
# From Linux' mman.h.
_MADV_PAGEOUT = 21


def give_back_freed() -> None:
    """Let the C library return what it keeps of memory that was freed.

    Loading frees weights in their first precision and layout, in pieces between those that stay.
    """
    if hasattr(_LIBRARY, "malloc_trim"):
        _LIBRARY.malloc_trim(0)


def page_out(module: nn.Module) -> None:
    """Hand back the pages of a network on the CPU that will not be used for long; they come back when they are.

    Those that were mapped from a file are read from it again, others from the swap space, and stay where there is none.
    """
    if not hasattr(_LIBRARY, "madvise"):
        return
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.device.type == "cpu":
            storage = tensor.untyped_storage()
            first = -(-storage.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
            size = storage.data_ptr() + storage.nbytes() - first
            if size > 0:
                _LIBRARY.madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), _MADV_PAGEOUT)
