"""SIGTERM and Ctrl-C, heeded between two steps."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

_HEEDED = (signal.SIGTERM, signal.SIGINT)


class StopSignal:
    """Inside the block the first SIGTERM or Ctrl-C is remembered; a second one acts at once, as before the block.

    Only the main thread of a process can use it.

    Attributes:
        number: the signal that came, 0 as long as there was none.
    """

    def __init__(self) -> None:
        self.number = 0
        # A handler that was not set from Python reads as None and cannot be set from here.
        self._before = {number: signal.getsignal(number) or signal.SIG_DFL for number in _HEEDED}

    def __enter__(self) -> StopSignal:
        for number in _HEEDED:
            signal.signal(number, self._remember)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._put_back()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self._put_back()

    def _put_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
