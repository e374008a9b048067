"""What of its memory a process hands back to the system. Nothing happens where the C library or kernel cannot."""

from __future__ import annotations

import ctypes
import mmap
import sys
from typing import Any

from torch import nn

_LIBRARY: Any = ctypes.CDLL(None) if sys.platform == "linux" else None
# From malloc.h of glibc and from Linux' mman.h.
_M_MMAP_THRESHOLD = -3
_MADV_PAGEOUT = 21
# A tensor of this size or more gets pages of its own, which are free once it is.
_OWN_PAGES = 2**20


def keep_tensors_apart() -> None:
    """Let the C library give each large tensor pages of its own, from now on.

    By default it packs tensors of up to 32 MiB together as soon as one of that size was freed, and keeps what lies
    between those that stay: half a GB in the training of Stable Diffusion's UNet.
    """
    if hasattr(_LIBRARY, "mallopt"):
        _LIBRARY.mallopt(_M_MMAP_THRESHOLD, _OWN_PAGES)


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
