"""Work on images by several threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")
THREADS = min(8, os.cpu_count() or 1)


def in_threads(function: Callable[[S], T], items: Iterable[S]) -> list[T]:
    """`function` of each item, several at a time: Pillow and files let others run meanwhile."""
    # Made for each call: the threads of a lasting pool would not be there after a fork.
    pool = ThreadPoolExecutor(THREADS)
    try:
        return list(pool.map(function, items))
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for thousands of images
