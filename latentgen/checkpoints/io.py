"""Safetensors files: one check of the header, one reader (memory-mapped), one writer (piece by piece).

Layout (https://huggingface.co/docs/safetensors, "Format"): 8 bytes little-endian length N, N bytes of JSON
that map each tensor's name to its dtype, shape and byte range, then the bytes of all tensors without gaps.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeGuard

import torch
from torch import Tensor

from latentgen.errors import (
    CheckpointCorruptError,
    CheckpointNotFoundError,
    CheckpointValueError,
    UnsafeCheckpointError,
)
from latentgen.files import parse_json_object, quote, wrong_content

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
ITEM_BYTES = {name: dtype.itemsize for name, dtype in TORCH_DTYPES.items()}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
_INTEGERS = {dtype.itemsize: dtype for dtype in (torch.int8, torch.int16, torch.int32, torch.int64)}
_COMPARED_BYTES = 2**20  # stays in a core's cache for the second pass
PIECE_BYTES = 16 * 2**20
PICKLE_SUFFIXES = frozenset({".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle"})
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


class TensorInfo(NamedTuple):
    """One tensor of a file: ``dtype`` is the format's own name ("F16"), ``nbytes`` its size in bytes."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class Header(Mapping[str, TensorInfo]):
    """The tensors of one file by name, in the file's order, and the text metadata stored with them.

    Attributes:
        begins: the offset of each tensor in the file, in bytes.
        file_bytes: the size of the file, in bytes.
    """

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    begins: Mapping[str, int]
    file_bytes: int

    def __getitem__(self, name: str) -> TensorInfo:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


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
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            head = file.read(1024)
            length = int.from_bytes(head[:8], "little")
            _check_start(path, head, length, size)
            file.seek(8)
            data = file.read(length)
    except OSError as error:
        raise CheckpointNotFoundError(f"{quote(path)} cannot be read: {error.strerror or error}") from error
    return _parse(path, data, size - 8 - length)


def open_checkpoint(path: Path) -> BufferedReader:
    """A file open for reading; CheckpointNotFoundError if it cannot be opened."""
    try:
        return open(path, "rb")
    except OSError as error:
        raise CheckpointNotFoundError(f"{quote(path)} cannot be read: {error.strerror or error}") from error


def refuse_pickle(path: Path) -> None:
    """Raise UnsafeCheckpointError if the suffix of the file is that of a pickle."""
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise UnsafeCheckpointError(
            f"{quote(path)} is a pickle, which can run code when it is opened; only .safetensors files are "
            f"read: convert it safely with `latentgen convert {path.name}`"
        )


def is_pickle(path: Path) -> bool:
    """Whether the suffix of a file or its first bytes are those of a pickle; CheckpointNotFoundError if unreadable."""
    with open_checkpoint(path) as file:
        head = file.read(9)
    return path.suffix.lower() in PICKLE_SUFFIXES or _starts_as_pickle(head)


class MappedFile:
    """A memory-mapped safetensors file: tensors are read as they are used.

    Writing to a tensor does not change the file, and replacing the file does not change the tensors, which keep the
    mapping alive. Truncating the file in place ends the process when a tensor is used (SIGBUS).

    Attributes:
        path: the file.
        header: its tensors and metadata.
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
        """Free the pages of a tensor; they are read again if it is used again."""
        begin = self.header.begins[key]
        # Whole pages only: a neighbor on the same page may have been written to.
        first = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (begin + self.header[key].nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if first < last and hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
            self._map.madvise(mmap.MADV_DONTNEED, first, last - first)


def read_pieces(path: Path, header: Header, name: str) -> Iterator[Tensor]:
    """The values of one tensor in order, as flat tensors of at most ``PIECE_BYTES``.

    They are read, not mapped: a file truncated in the meantime is an error and does not end the process.

    Raises:
        CheckpointNotFoundError: the file cannot be opened.
        CheckpointCorruptError: the file became shorter.
    """
    info, dtype = header[name], TORCH_DTYPES[header[name].dtype]
    with open_checkpoint(path) as file:
        file.seek(header.begins[name])
        for start in range(0, info.nbytes, PIECE_BYTES):
            buffer = bytearray(min(PIECE_BYTES, info.nbytes - start))
            if file.readinto(buffer) != len(buffer):
                raise CheckpointCorruptError(
                    f"{quote(path)} became shorter while it was read; download it again"
                )
            yield torch.frombuffer(buffer, dtype=dtype)


def write_tensors(
    file: BinaryIO,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    *,
    dtype: torch.dtype | None = None,
    checked_source: Path | None = None,
    advance: Callable[[int], object] | None = None,
) -> dict[str, TensorInfo]:
    """Write a safetensors file, one tensor at a time; returns its tensors.

    Args:
        tensors: on any device, with any strides; every dtype is one of ``DTYPE_NAMES``.

    The other arguments and errors are those of :func:`write_pieces`.
    """

    def pieces(name: str) -> Iterable[Tensor]:
        values = tensors[name].detach().cpu().contiguous().flatten()
        return values.split(max(1, PIECE_BYTES // values.itemsize))

    infos = {name: TensorInfo(DTYPE_NAMES[t.dtype], tuple(t.shape), t.nbytes) for name, t in tensors.items()}
    return write_pieces(
        file, infos, pieces, metadata, dtype=dtype, checked_source=checked_source, advance=advance
    )


def write_pieces(
    file: BinaryIO,
    tensors: Mapping[str, TensorInfo],
    pieces: Callable[[str], Iterable[Tensor]],
    metadata: Mapping[str, str],
    *,
    dtype: torch.dtype | None = None,
    checked_source: Path | None = None,
    advance: Callable[[int], object] | None = None,
) -> dict[str, TensorInfo]:
    """Write a safetensors file piece by piece; returns its tensors.

    Args:
        tensors: the tensors before the change of precision.
        pieces: returns the values of a tensor by its name, in order, as flat tensors on the CPU.
        metadata: text for the header.
        dtype: what floating-point tensors become; None keeps each one's own.
        checked_source: the file named in errors about values; None checks no values.
        advance: called with the number of bytes of each piece after it is written.

    Raises:
        CheckpointValueError: a value is NaN or infinite, or too large for ``dtype``.
    """
    targets: dict[str, torch.dtype] = {}
    for name, info in tensors.items():
        own = TORCH_DTYPES[info.dtype]
        targets[name] = dtype if dtype and own.is_floating_point else own
    # Wider items first, so that every tensor is aligned to its item size.
    infos = {
        name: TensorInfo(
            DTYPE_NAMES[target], tensors[name].shape, math.prod(tensors[name].shape) * target.itemsize
        )
        for name, target in sorted(targets.items(), key=lambda item: -item[1].itemsize)
    }
    file.write(encode_header(infos, metadata))
    for name in infos:
        for piece in pieces(name):
            if checked_source is not None:
                check_values(piece, dtype, name, checked_source)
            file.write(piece.to(targets[name]).view(torch.uint8).numpy().data)
            if advance is not None:
                advance(piece.nbytes)
    return infos


def check_values(tensor: Tensor, dtype: torch.dtype | None, key: str, file: Path) -> None:
    """Refuse NaN, infinity, and what overflows ``dtype``, in one pass that allocates nothing."""
    if not tensor.is_floating_point():
        return
    largest = _largest_magnitude(tensor)
    where = f"{quote(file)}: tensor {quote(key)}"
    if not math.isfinite(largest):
        raise CheckpointValueError(f"{where} holds NaN or infinity: the file is damaged or training diverged")
    if dtype is not None and largest > torch.finfo(dtype).max:
        raise CheckpointValueError(f"{where} reaches {largest:.6g}, too large for {dtype}; use float32")


def _largest_magnitude(tensor: Tensor) -> float:
    """The largest magnitude in a floating-point tensor on the CPU; not finite if any value is not.

    Without its sign bit, an IEEE 754 number is an integer that grows with its magnitude; infinity and then NaN are the
    largest. numpy compares integers faster than torch compares halves, and starts no threads for small tensors.
    """
    width = tensor.itemsize
    signed = tensor.detach().contiguous().flatten().view(_INTEGERS[width]).numpy()
    unsigned, magnitude, largest = signed.view(f"u{width}"), 2 ** (8 * width - 1) - 1, 0
    for start in range(0, len(signed), _COMPARED_BYTES // width):
        piece = slice(start, start + _COMPARED_BYTES // width)
        # The largest of the positive numbers, then of the negative ones.
        largest = max(largest, int(signed[piece].max()), int(unsigned[piece].max()) & magnitude)
    return torch.tensor(largest, dtype=_INTEGERS[width]).view(tensor.dtype).item()


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


def _starts_as_pickle(head: bytes) -> bool:
    # The length of a header can begin with the same bytes; JSON follows it.
    return head.startswith(_PICKLE_STARTS) and head[8:9] != b"{"


def _check_start(path: Path, head: bytes, length: int, size: int) -> None:
    if problem := wrong_content(head):
        raise CheckpointCorruptError(
            f"{quote(path)} is {problem}, not a safetensors file ({size:,} bytes found); download the file "
            "again"
        )
    if _starts_as_pickle(head):
        raise UnsafeCheckpointError(
            f"{quote(path)} is a pickle with the name of a safetensors file; it can run code when it is "
            f"opened: convert it safely with `latentgen convert {path.name}`"
        )
    if size < 10:
        raise CheckpointCorruptError(f"{quote(path)} holds {size} bytes; a safetensors file has at least 10")
    if length > MAX_HEADER_BYTES:
        raise CheckpointCorruptError(
            f"{quote(path)} is not a safetensors file: its first 8 bytes announce a header of {length:,} "
            f"bytes, at most {MAX_HEADER_BYTES:,} are allowed"
        )
    if 8 + length > size:
        raise CheckpointCorruptError(
            f"{quote(path)} is truncated inside its header: at least {8 + length:,} bytes expected, {size:,} "
            "found; download the file again"
        )


def _parse(path: Path, data: bytes, data_bytes: int) -> Header:
    entries = parse_json_object(data, f"{path} (header)")
    metadata = _metadata(path, entries.pop("__metadata__", {}))
    if len(entries) > MAX_TENSORS:
        raise CheckpointCorruptError(
            f"{quote(path)} has {len(entries):,} tensors; at most {MAX_TENSORS:,} are read"
        )
    tensors: dict[str, TensorInfo] = {}
    ranges: list[tuple[int, int, str]] = []
    for name, entry in entries.items():
        info, begin, end = _tensor(path, name, entry)
        tensors[name] = info
        ranges.append((begin, end, name))
    position = 0
    for begin, end, name in sorted(ranges):
        if begin != position:
            kind = "overlaps the tensor before it" if begin < position else "leaves a gap before it"
            raise CheckpointCorruptError(
                f"{quote(path)}: tensor {quote(name)} begins at byte {begin:,} of the data, which {kind} "
                f"(expected {position:,})"
            )
        position = end
    if position != data_bytes:
        kind = "is truncated" if position > data_bytes else "has bytes after its last tensor"
        header_bytes = 8 + len(data)
        raise CheckpointCorruptError(
            f"{quote(path)} {kind}: {header_bytes + position:,} bytes expected, {header_bytes + data_bytes:,}"
            " found; download the file again"
        )
    start = 8 + len(data)
    begins = {name: start + begin for begin, _, name in ranges}
    return Header(tensors, metadata, begins, start + data_bytes)


def _metadata(path: Path, value: object) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise CheckpointCorruptError(f"{quote(path)}: __metadata__ has to map names to text")
    return value


def _tensor(path: Path, name: str, entry: object) -> tuple[TensorInfo, int, int]:
    """One entry of the header as its information and its byte range."""

    def corrupt(what: str) -> CheckpointCorruptError:
        return CheckpointCorruptError(f"{quote(path)}: tensor {quote(name)} {what}")

    if not name or "\0" in name or any("\ud800" <= character <= "\udfff" for character in name):
        raise corrupt("has a name that is empty or not valid text")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise corrupt("needs exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise corrupt(f"has dtype {quote(dtype)}; known are {', '.join(ITEM_BYTES)}")
    if not _are_sizes(shape, MAX_DIMENSIONS):
        raise corrupt(f"has shape {quote(shape)}; allowed are up to {MAX_DIMENSIONS} positive integers")
    if 0 in shape:
        raise corrupt(f"has shape {shape} with a dimension of size zero")
    if not _are_sizes(offsets, 2) or len(offsets) < 2:
        raise corrupt(f"has data_offsets {quote(offsets)}; two integers are needed")
    info = TensorInfo(dtype, tuple(shape), math.prod(shape) * ITEM_BYTES[dtype])
    begin, end = offsets
    if end - begin != info.nbytes:
        raise corrupt(f"spans {end - begin:,} bytes; {dtype} {quote(shape)} needs {info.nbytes:,}")
    return info, begin, end


def _are_sizes(value: object, at_most: int) -> TypeGuard[list[int]]:
    """Whether ``value`` lists up to ``at_most`` integers from 0 to 2**63 - 1, and no booleans."""
    if not isinstance(value, list) or len(value) > at_most:
        return False
    return all(type(item) is int and 0 <= item < 2**63 for item in value)
