"""Counts the file operations of a run and makes one of them fail, or wait to be killed: for tests/survival.py.

Everything here is installed into a child process and ends with it.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from latentgen.train import trainer

WRITING = ("open", "write", "fsync", "replace", "rename", "mkdir")
DELETING = ("unlink", "rmdir")
# A full disk refuses only those that need room.
_NEED_ROOM = ("open", "write", "fsync", "mkdir")


@dataclass(frozen=True)
class Fault:
    """What happens to a process at one of its operations.

    Attributes:
        number: the operation, counted from 1.
        place: counted while checkpoints are written, or all the time.
        error: an errno to fail with; None to say so through the pipe and wait for a signal.
    """

    number: int
    place: Literal["checkpoint", "anywhere"]
    error: int | None = None


class Operations:
    """Counts what this process does to the files below a folder, and carries out a fault.

    Args:
        folder: the run's.
        fault: what happens; None to only count.
        pipe: gets one byte when it happens.
    """

    def __init__(self, folder: Path, fault: Fault | None, pipe: int) -> None:
        self.counts = {"checkpoint": 0, "anywhere": 0}
        self._folder = str(folder)
        self._fault = fault
        self._pipe = pipe
        self._saving = False
        self._failing = False
        self._open = io.open

    def install(self) -> None:
        """Intercept the file operations of this process from now on."""
        for name in ("fsync", "replace", "rename", "mkdir", *DELETING):
            setattr(os, name, self._counted(name, getattr(os, name)))
        for module in (builtins, io):
            module.open = self._opened
        save_checkpoint = trainer.save_checkpoint

        def save(*args: Any, **kwargs: Any) -> Path:
            self._saving = True
            try:
                return save_checkpoint(*args, **kwargs)
            finally:
                self._saving = False

        trainer.save_checkpoint = save

    def before(self, name: str, partly: Callable[[], object] = lambda: None) -> None:
        """Count an operation; at the fault's, do a part of it and fail or wait."""
        fault = self._fault
        if fault is not None and fault.error is not None and name in DELETING:
            if self._failing and fault.error == errno.EROFS:
                raise OSError(fault.error, os.strerror(fault.error))
            return
        self.counts["anywhere"] += 1
        self.counts["checkpoint"] += self._saving
        if fault is None:
            return
        is_due = self.counts[fault.place] == fault.number and (self._saving or fault.place == "anywhere")
        if is_due and not self._failing:
            self._failing = True
            partly()
            os.write(self._pipe, b"!")
            while fault.error is None:
                time.sleep(1)
            raise OSError(fault.error, os.strerror(fault.error))
        lasting = (fault.error == errno.ENOSPC and name in _NEED_ROOM) or fault.error == errno.EROFS
        if self._failing and lasting and fault.error is not None:
            raise OSError(fault.error, os.strerror(fault.error))

    def _counted(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any, **kwargs: Any) -> Any:
            # fsync takes a descriptor; only the run's files are synced here.
            if name == "fsync" or self._is_below(args[0]):
                self.before(name)
            return original(*args, **kwargs)

        return operation

    def _opened(self, file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if not set(mode) & set("wxa") or not self._is_below(file):
            return self._open(file, mode, *args, **kwargs)
        self.before("open")
        return _File(self._open(file, mode, *args, **kwargs), self)

    def _is_below(self, path: Any) -> bool:
        # Relative to a descriptor: from rmtree, which deletes only files of the run.
        return not isinstance(path, int) and (
            not os.path.isabs(path) or os.fspath(path).startswith(self._folder)
        )


class _File:
    """A file whose writes are counted."""

    def __init__(self, file: Any, operations: Operations) -> None:
        self._file = file
        self._operations = operations

    def write(self, data: Any) -> int:
        def half() -> None:
            self._file.write(data[: len(data) // 2])
            self._file.flush()

        self._operations.before("write", half)
        return self._file.write(data)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *args: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def limit_file_size(size: int) -> None:
    """Make the kernel fail writes beyond `size` bytes of a file, with EFBIG."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
