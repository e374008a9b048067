"""SIGTERM and Ctrl-C, handled between two steps."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignal:
    """Inside the block the first SIGTERM or Ctrl-C is only recorded; a second one acts at once, as outside the block.

    Works in the main thread of a process only.

    Attributes:
        number: the signal received; 0 if none.
    """

    def __init__(self) -> None:
        self.number = 0
        # A handler that was not set from Python reads as None and cannot be set from here.
        self._previous = {number: signal.getsignal(number) or signal.SIG_DFL for number in _SIGNALS}

    def __enter__(self) -> StopSignal:
        for number in _SIGNALS:
            signal.signal(number, self._record)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _record(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
