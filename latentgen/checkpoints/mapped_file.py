"""Safetensors files in memory: tensors are views of a mapping, which the system reads as they are used."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from latentgen.checkpoints.headers import read_header
from latentgen.errors import CheckpointCorruptError, CheckpointNotFoundError
from latentgen.files import quote

# The format's names.
TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8,
    "U16": torch.uint16, "I16": torch.int16, "U32": torch.uint32, "I32": torch.int32,
    "U64": torch.uint64, "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip


class MappedFile:
    """A safetensors file whose tensors are read as they are used, and never by loading the whole.

    Writing to a tensor leaves the file as it is, and replacing the file leaves the tensors as they are. They keep the
    mapping alive.

    Attributes:
        path: the file.
        header: what it holds.
    """

    def __init__(self, path: Path) -> None:
        """Open a file and validate its header.

        Raises:
            CheckpointNotFoundError, CheckpointCorruptError, UnsafeCheckpointError: the file cannot be read.
        """
        self.path = path
        self.header = read_header(path)
        try:
            with open(path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise CheckpointNotFoundError(f"{quote(path)} cannot be read: {error}") from error
        if len(self._map) != self.header.file_bytes:
            raise CheckpointCorruptError(f"{quote(path)} was changed while it was read; load it again")

    def tensor(self, key: str) -> Tensor:
        """A tensor as a view of the file."""
        info = self.header[key]
        dtype = TORCH_DTYPES[info.dtype]
        count, begin = info.nbytes // dtype.itemsize, self.header.begins[key]
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=begin).view(info.shape)

    def release(self, key: str) -> None:
        """Give back the memory that the pages of a tensor take; if it is used again, they are read again."""
        begin = self.header.begins[key]
        # Whole pages only: a neighbour on the same page may have been written to.
        first = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (begin + self.header[key].nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if first < last and hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
            self._map.madvise(mmap.MADV_DONTNEED, first, last - first)
