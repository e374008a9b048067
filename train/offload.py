"""Where what is needed once a step waits off its device: in the memory of the host, or in a file."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryFile
from typing import Protocol

import torch
from torch import Tensor

from latentgen.errors import OutputError
from latentgen.files import quote

# Of the tensors in a file, in bytes: more than any dtype asks for.
_ALIGNMENT = 64


class TensorStore(Protocol):
    """Keeps one tensor of the shape, dtype and memory format of each of some parameters, by the parameters' number."""

    def send(self, place: int, tensor: Tensor) -> None:
        """Keep a tensor, instead of the one that was kept before."""
        ...

    def fetch(self, place: int) -> Tensor:
        """The tensor that is kept, on the device of its parameter, until the next one is fetched."""
        ...

    def look(self, place: int) -> Tensor:
        """The tensor that is kept, where it lies; to be read alone, and before the next one is sent."""
        ...


def store_for(parameters: Sequence[Tensor], folder: Path) -> TensorStore:
    """Where to keep tensors like `parameters`: on the host beside an accelerator, beside the CPU in a file in `folder`.

    Raises:
        OutputError: the file cannot be made as large as they are.
    """
    if any(parameter.device.type == "cpu" for parameter in parameters):
        return FileStore(parameters, folder)
    return HostStore(parameters)


class HostStore:
    """In the memory of the host; pinned beside CUDA, so that copies do not wait."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._device = [parameter.device for parameter in parameters]
        self._kept = [
            torch.empty_like(parameter, device="cpu", requires_grad=False, pin_memory=parameter.is_cuda)
            for parameter in parameters
        ]

    def send(self, place: int, tensor: Tensor) -> None:
        """Keep a tensor, instead of the one that was kept before."""
        # In the order of one stream, as `fetch`.
        self._kept[place].copy_(tensor, non_blocking=tensor.is_cuda)

    def fetch(self, place: int) -> Tensor:
        """The tensor that is kept, on the device of its parameter."""
        kept = self._kept[place]
        return kept.to(self._device[place], non_blocking=kept.is_pinned(), copy=True)

    def look(self, place: int) -> Tensor:
        """The tensor that is kept, where it lies."""
        if self._device[place].type == "cuda":
            torch.cuda.synchronize(self._device[place])
        return self._kept[place]


class FileStore:
    """In a file without a name, which is gone when the process is.

    Args:
        parameters: tensors like these will be kept; on the CPU.
        folder: on whose disk; where it does not exist yet, the nearest one above it.

    Raises:
        OutputError: the file cannot be made, or the disk has no room for it.
    """

    def __init__(self, parameters: Sequence[Tensor], folder: Path) -> None:
        self._parameters = parameters
        self._starts = [0, *accumulate(-(-p.nbytes // _ALIGNMENT) * _ALIGNMENT for p in parameters)]
        # Fresh pages for each tensor would cost more than to read it.
        self._fetched = torch.empty(max((p.nbytes for p in parameters), default=0), dtype=torch.uint8)
        self._folder = nearest(folder)
        self._mapped: mmap.mmap | None = None
        try:
            self._file = TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115  (as long as this lives)
            self._file.truncate(self._starts[-1])
            _take_room(self._file.fileno(), self._starts[-1])
        except OSError as error:
            raise self._failed(error) from None

    def send(self, place: int, tensor: Tensor) -> None:
        """Keep a tensor, instead of the one that was kept before.

        Raises:
            OutputError: it cannot be written.
        """
        parameter = self._parameters[place]
        if tensor.stride() != parameter.stride():
            tensor = torch.empty_like(parameter, requires_grad=False).copy_(tensor)
        left = _memory_of(tensor)
        try:
            self._file.seek(self._starts[place])
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise self._failed(error) from None

    def fetch(self, place: int) -> Tensor:
        """The tensor that is kept, in memory, until the next one is fetched.

        Raises:
            OutputError: it cannot be read.
        """
        self._mapped = None  # what a checkpoint has looked at takes memory no longer
        parameter = self._parameters[place]
        memory = self._fetched[: parameter.nbytes]
        left = memory.numpy().data
        try:
            self._file.seek(self._starts[place])
            while left:
                read = self._file.readinto(left)
                if not read:
                    raise OSError(errno.EIO, "it ends too soon")
                left = left[read:]
        except OSError as error:
            raise self._failed(error) from None
        return memory.view(parameter.dtype).as_strided(parameter.shape, parameter.stride())

    def look(self, place: int) -> Tensor:
        """The tensor that is kept, in the file, parts of which take memory as they are read.

        Raises:
            OutputError: the file cannot be mapped into memory.
        """
        parameter = self._parameters[place]
        try:
            # One for all: each takes one of the files that a process may have open.
            self._mapped = self._mapped or mmap.mmap(self._file.fileno(), self._starts[-1])
        except OSError as error:
            raise self._failed(error) from None
        flat = torch.frombuffer(
            self._mapped, dtype=parameter.dtype, count=parameter.numel(), offset=self._starts[place]
        )
        return flat.as_strided(parameter.shape, parameter.stride())

    def _failed(self, error: OSError) -> OutputError:
        return OutputError(
            f"{quote(self._folder)} cannot hold the gradients or moments ({self._starts[-1] / 1e9:.3g} GB): "
            f"{error.strerror}; let output_dir be on another disk, or set memory.offload_optimizer to false"
        )


def nearest(folder: Path) -> Path:
    """A folder, or the nearest one above it that exists."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def _take_room(file: int, size: int) -> None:
    """Let a disk that is full say so now, and not in a step."""
    if not hasattr(os, "posix_fallocate") or not size:
        return
    try:
        os.posix_fallocate(file, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # the file system cannot
            raise


def _memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on the CPU, in the order in which they lie."""
    flat = tensor.detach().as_strided((tensor.numel(),), (1,))
    return flat.view(torch.uint8).numpy().data
