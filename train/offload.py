"""Where gradients lie that have left their device: in the memory of the host, or in a file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryFile
from typing import Protocol

import torch
from torch import Tensor

from latentgen.errors import OutputError


class GradientStore(Protocol):
    """Keeps the gradients of parameters, by the parameters' number."""

    def send(self, place: int, gradient: Tensor) -> None:
        """Keep a gradient, in the place of the one that was kept before."""
        ...

    def fetch(self, place: int) -> Tensor:
        """The gradient, on its device and in the memory format of its parameter, until the next one is fetched."""
        ...


def store_for(parameters: Sequence[Tensor], folder: Path) -> GradientStore:
    """Where the gradients of `parameters` go: to the host from an accelerator, from the CPU into a file in `folder`.

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

    def send(self, place: int, gradient: Tensor) -> None:
        """Keep a gradient, in the place of the one that was kept before."""
        # In the order of one stream, as is `fetch`: nothing else reads it.
        self._kept[place].copy_(gradient, non_blocking=gradient.is_cuda)

    def fetch(self, place: int) -> Tensor:
        """The gradient, on its device and in the memory format of its parameter, until the next one is fetched."""
        kept = self._kept[place]
        return kept.to(self._device[place], non_blocking=kept.is_pinned(), copy=True)


class FileStore:
    """In a file without a name, which is gone when the process is.

    Args:
        parameters: whose gradients it will keep, on the CPU.
        folder: on whose disk; where it does not exist yet, the nearest one above it.

    Raises:
        OutputError: the file cannot be made, or the disk has no room for the gradients.
    """

    def __init__(self, parameters: Sequence[Tensor], folder: Path) -> None:
        self._parameters = parameters
        sizes = [parameter.nbytes for parameter in parameters]
        self._starts = [0, *accumulate(sizes)]
        # Fresh pages for each gradient would cost more than to read it.
        self._fetched = torch.empty(max(sizes, default=0), dtype=torch.uint8)
        self._folder = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
        try:
            self._file = TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115  (as long as this lives)
            # Now, and not in the first step, which may be an hour away.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._file.fileno(), 0, sum(sizes))
        except OSError as error:
            raise self._failed(error) from None

    def send(self, place: int, gradient: Tensor) -> None:
        """Keep a gradient, in the place of the one that was kept before.

        Raises:
            OutputError: it cannot be written.
        """
        parameter = self._parameters[place]
        if gradient.stride() != parameter.stride():
            gradient = torch.empty_like(parameter, requires_grad=False).copy_(gradient)
        left = _memory_of(gradient)
        try:
            self._file.seek(self._starts[place])
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise self._failed(error) from None

    def fetch(self, place: int) -> Tensor:
        """The gradient, in the memory format of its parameter, until the next one is fetched.

        Raises:
            OutputError: it cannot be read.
        """
        parameter = self._parameters[place]
        memory = self._fetched[: parameter.nbytes]
        left = memoryview(memory.numpy())
        try:
            self._file.seek(self._starts[place])
            while left:
                read = self._file.readinto(left)
                if not read:
                    raise OSError("it ends too soon")
                left = left[read:]
        except OSError as error:
            raise self._failed(error) from None
        return memory.view(parameter.dtype).as_strided(parameter.shape, parameter.stride())

    def _failed(self, error: OSError) -> OutputError:
        size = self._starts[-1] / 1e9
        return OutputError(
            f"the gradients ({size:.3g} GB) cannot be kept in a file in {self._folder}: {error}; make room there, or "
            "set memory.offload_gradients to false"
        )


def _memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on the CPU, in the order in which they lie."""
    flat = tensor.detach().as_strided((tensor.numel(),), (1,))
    return memoryview(flat.view(torch.uint8).numpy())
