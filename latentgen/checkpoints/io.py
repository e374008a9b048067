"""Safetensors files: one check of the header, one reader (memory-mapped), one writer (piece by piece).

Layout (https://huggingface.co/docs/safetensors, "Format"): 8 bytes little-endian length N, N bytes of JSON
that map each tensor's name to its dtype, shape and byte range, then the bytes of all tensors without gaps.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Callable, Mapping
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from latentgen.errors import (
    CheckpointCorruptError,
    CheckpointNotFoundError,
    CheckpointValueError,
    UnsafeCheckpointError,
)
from latentgen.files import quote, unique_keys, wrong_content

MAX_TENSORS = 20_000
MAX_HEADER_BYTES = 16 * 2**20
MAX_DIMENSIONS = 8
# The format's names.
TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8,
    "U16": torch.uint16, "I16": torch.int16, "U32": torch.uint32, "I32": torch.int32,
    "U64": torch.uint64, "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
PIECE_BYTES = 16 * 2**20
PICKLE_SUFFIXES = frozenset({".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle"})
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


class TensorInfo(NamedTuple):
    """One tensor of a file: ``dtype`` is the format's own name ("F16"), ``nbytes`` its size in bytes."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @classmethod
    def of(cls, tensor: Tensor, dtype: torch.dtype | None = None) -> TensorInfo:
        """The information for a tensor, or for its copy with another dtype."""
        dtype = dtype or tensor.dtype
        return cls(DTYPE_NAMES[dtype], tuple(tensor.shape), tensor.numel() * dtype.itemsize)


class Header(dict[str, TensorInfo]):
    """The tensors of one file by name, in the file's order.

    Attributes:
        metadata: the text stored with them.
        begins: the offset of each tensor in the file, in bytes.
        file_bytes: the size of the file, in bytes.
    """

    def __init__(self, entries: dict[str, dict], start: int, file_bytes: int) -> None:
        """Read the entries of a valid header; ``start`` is where the header ends in the file, in bytes."""
        self.metadata: Mapping[str, str] = entries.pop("__metadata__", None) or {}
        self.begins = {name: start + entry["data_offsets"][0] for name, entry in entries.items()}
        self.file_bytes = file_bytes
        for name, entry in entries.items():
            begin, end = entry["data_offsets"]
            self[name] = TensorInfo(entry["dtype"], tuple(entry["shape"]), end - begin)


def read_header(path: str | Path) -> Header:
    """The validated header of a safetensors file; reads no tensor.

    Raises:
        CheckpointNotFoundError: the file does not exist.
        UnsafeCheckpointError: the file is a pickle.
        CheckpointCorruptError: the file is truncated, is not safetensors, or has an invalid header.
    """
    path = Path(path)
    refuse_pickle(path)
    if not path.is_file():
        raise CheckpointNotFoundError(f"{quote(path)} does not exist or is not a file")
    with open_checkpoint(path) as file:
        head = file.read(1024)
        length, file_bytes = int.from_bytes(head[:8], "little"), file.seek(0, 2)
        _check_start(path, head, length, file_bytes)
        file.seek(8)
        text = file.read(length)
        try:
            with safe_open(path, framework="np"):  # checks that the tensors fill the file without gaps
                pass
            header = Header(json.loads(text, object_pairs_hook=unique_keys), 8 + length, file_bytes)
        except (SafetensorError, ValueError, OSError) as error:
            sizes = f"it has {file_bytes:,} of {_declared_bytes(text, length)} bytes"
            raise CheckpointCorruptError(
                f"{quote(path)} is truncated or damaged: {sizes} ({quote(str(error))}); download the file again"
            ) from error
    if len(header) > MAX_TENSORS:
        raise CheckpointCorruptError(
            f"{quote(path)} has {len(header):,} tensors; at most {MAX_TENSORS:,} are read"
        )
    for name, info in header.items():
        if info.dtype not in TORCH_DTYPES or len(info.shape) > MAX_DIMENSIONS or not info.nbytes:
            raise CheckpointCorruptError(
                f"{quote(path)}: tensor {quote(name)} is {info.dtype} {quote(list(info.shape))}; allowed are "
                f"1 to {MAX_DIMENSIONS} dimensions, none of size zero, and the dtypes {', '.join(TORCH_DTYPES)}"
            )
    return header


def _declared_bytes(text: bytes, length: int) -> str:
    """The size of the file according to its header, if that can be read."""
    if len(text) < length:
        return f"at least {8 + length:,}"
    try:
        entries = json.loads(text)
        ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
        return f"{8 + length + max(ends):,}"
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return "an unknown number of"


def open_checkpoint(path: Path) -> BufferedReader:
    """A file open for reading; CheckpointNotFoundError if it cannot be opened."""
    try:
        return open(path, "rb")
    except OSError as error:
        raise CheckpointNotFoundError(f"{quote(path)} cannot be read: {error.strerror or error}") from error


def is_pickle(path: Path, head: bytes = b"") -> bool:
    """Whether the suffix of a file or its first bytes are those of a pickle."""
    # A safetensors file can begin with the same bytes, its header's length, but then JSON follows.
    return path.suffix.lower() in PICKLE_SUFFIXES or (head.startswith(_PICKLE_STARTS) and head[8:9] != b"{")


def refuse_pickle(path: Path, head: bytes = b"") -> None:
    """Raise UnsafeCheckpointError if the suffix of a file or its first bytes are those of a pickle."""
    if is_pickle(path, head):
        raise UnsafeCheckpointError(
            f"{quote(path)} is a pickle, which can run code when it is opened; only .safetensors files are "
            f"read: convert it safely with `latentgen convert {path}`"
        )


def refuse_pickles(folder: Path) -> None:
    """Raise UnsafeCheckpointError if the suffix of a file in the folder is that of a pickle."""
    for file in sorted(folder.iterdir()):
        refuse_pickle(file)


class MappedFile:
    """A memory-mapped safetensors file: tensors are read as they are used.

    Writing to a tensor does not change the file, and replacing the file does not change the tensors, which keep the
    mapping alive. If the file is truncated in place, using a tensor kills the process (SIGBUS).

    Attributes:
        path: the file.
        header: its tensors and metadata.
    """

    def __init__(self, path: Path) -> None:
        """Open a file and validate its header; errors as :func:`read_header`."""
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
        """Free the pages of a tensor; they are read again if it is used again."""
        begin = self.header.begins[key]
        # Whole pages only: a neighbor on the same page may have been written to.
        first = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (begin + self.header[key].nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if first < last and hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
            self._map.madvise(mmap.MADV_DONTNEED, first, last - first)


def write_tensors(
    file: BinaryIO,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    *,
    dtype: torch.dtype | None = None,
    checked_source: Path | None = None,
    advance: Callable[[int], object] | None = None,
) -> dict[str, TensorInfo]:
    """Write a safetensors file in pieces of at most ``PIECE_BYTES``; returns its tensors.

    Args:
        tensors: on any device, with any strides; every dtype is one of ``DTYPE_NAMES``.
        metadata: text for the header.
        dtype: what floating-point tensors become; None keeps each one's own.
        checked_source: the file named in errors about values; None checks no values.
        advance: called with the number of bytes of each piece after it is written.

    Raises:
        CheckpointValueError: a value is NaN or infinite, or too large for ``dtype``.
    """
    targets = {name: dtype if dtype and t.is_floating_point() else t.dtype for name, t in tensors.items()}
    # Wider items first, so that every tensor is aligned to its item size.
    names = sorted(tensors, key=lambda name: -targets[name].itemsize)
    infos = {name: TensorInfo.of(tensors[name], targets[name]) for name in names}
    file.write(encode_header(infos, metadata))
    for name in names:
        values = tensors[name].detach().cpu().contiguous().flatten()
        for piece in values.split(max(1, PIECE_BYTES // values.itemsize)):
            if checked_source is not None:
                check_values(piece, dtype, name, checked_source)
            file.write(piece.to(targets[name]).view(torch.uint8).numpy().data)
            if advance is not None:
                advance(piece.nbytes)
    return infos


def check_values(tensor: Tensor, dtype: torch.dtype | None, key: str, file: Path) -> None:
    """Refuse NaN, infinity, and what overflows ``dtype``, in one pass."""
    if not tensor.is_floating_point() or not tensor.numel():
        return
    values = tensor.float() if tensor.itemsize == 1 else tensor  # torch has no aminmax for float8
    low, high = torch.aminmax(values.detach())
    largest = max(-low.item(), high.item())  # both are NaN if any value is
    where = f"{quote(file)}: tensor {quote(key)}"
    if not math.isfinite(largest):
        raise CheckpointValueError(f"{where} holds NaN or infinity: the file is damaged or training diverged")
    if dtype is not None and largest > torch.finfo(dtype).max:
        raise CheckpointValueError(f"{where} reaches {largest:.6g}, too large for {dtype}; use float32")


def encode_header(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> bytes:
    """The first bytes of a safetensors file whose tensors follow in this order, aligned to 8 bytes."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, info in tensors.items():
        begin, end = end, end + info.nbytes
        entries[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [begin, end]}
    data = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    data += b" " * (-len(data) % 8)
    return len(data).to_bytes(8, "little") + data


def _check_start(path: Path, head: bytes, length: int, file_bytes: int) -> None:
    """Refuse a file whose first bytes are other content, or declare a header that is too long."""
    if problem := wrong_content(head):
        raise CheckpointCorruptError(
            f"{quote(path)} is {problem}, not a safetensors file (it has {file_bytes:,} bytes); download it again"
        )
    refuse_pickle(path, head)
    if length > MAX_HEADER_BYTES:
        raise CheckpointCorruptError(
            f"{quote(path)} is not a safetensors file: its first 8 bytes declare a header of {length:,} "
            f"bytes, at most {MAX_HEADER_BYTES:,} are allowed"
        )
