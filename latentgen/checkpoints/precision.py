"""Checkpoints in another precision, written piece by piece: memory holds a piece of a tensor, never a file."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from latentgen.checkpoints.folder import CheckpointFolder
from latentgen.checkpoints.headers import ITEM_BYTES, TensorInfo, encode_header, read_header
from latentgen.checkpoints.weights import DTYPE_NAMES, check_values, variant_infix
from latentgen.errors import CheckpointCorruptError, CheckpointNotFoundError
from latentgen.files import atomic_folder, atomic_write, quote, safe_join, write_json

PIECE_BYTES = 16 * 2**20
_FLOAT8 = {torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"}
NAMES: Mapping[torch.dtype, str] = {**DTYPE_NAMES, **_FLOAT8}
_FLOATS = {name: dtype for dtype, name in NAMES.items() if dtype.is_floating_point}
# What a folder in the diffusers layout holds beside weights, and what its components cannot do without.
_KNOWN_FILES = frozenset(
    {
        *("config.json", "generation_config.json", "scheduler_config.json", "preprocessor_config.json"),
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
        *("vocab.json", "merges.txt", "spiece.model"),
    }
)


def write_tensors(
    file: BinaryIO,
    tensors: Mapping[str, TensorInfo],
    metadata: Mapping[str, str],
    pieces: Callable[[str], Iterable[Tensor]],
    *,
    dtype: torch.dtype | None,
    source: Path,
    advance: Callable[[int], object],
) -> None:
    """Write a safetensors file whose floating-point tensors have ``dtype``; None keeps each one's own.

    Args:
        tensors: what ``pieces`` gives, before the change of precision.
        pieces: the values of a tensor by its name, in order, as flat tensors; raw bytes if it is no float.
        source: named in errors.
        advance: called with the bytes of each piece when it is written.

    Raises:
        CheckpointValueError: a value is NaN or infinite, or too large for ``dtype``.
    """
    written = {name: _retyped(info, dtype) for name, info in tensors.items()}
    # Wider items first, so that every tensor is aligned to its item size.
    names = sorted(written, key=lambda name: -ITEM_BYTES[written[name].dtype])
    file.write(encode_header({name: written[name] for name in names}, metadata))
    for name in names:
        for piece in pieces(name):
            target = dtype if piece.is_floating_point() else None
            check_values(piece, target, name, source)
            values = piece if target is None else piece.to(target)
            file.write(values.view(torch.uint8).numpy().data)
            advance(piece.nbytes)


def convert_file(
    source: Path, target: Path, dtype: torch.dtype, advance: Callable[[int], object]
) -> dict[str, TensorInfo]:
    """Write a safetensors file in another precision; names, metadata and whole numbers stay as they are.

    Returns:
        The tensors written.

    Raises:
        CheckpointError: the file cannot be read, or a value is NaN, infinite or too large for ``dtype``.
        OutputError: the target cannot be written; what stood there is intact.
    """
    header = read_header(source)
    with atomic_write(target) as file:
        write_tensors(
            file,
            header,
            header.metadata,
            lambda name: _read_pieces(source, header[name], header.begins[name]),
            dtype=dtype,
            source=source,
            advance=advance,
        )
    return {name: _retyped(info, dtype) for name, info in header.items()}


def convert_folder(
    source: CheckpointFolder,
    target: Path,
    dtype: torch.dtype,
    variant: str | None,
    advance: Callable[[int], object],
) -> tuple[dict[str, TensorInfo], list[str]]:
    """Write a folder in the diffusers layout in another precision; what is not weights is copied as it is.

    Args:
        variant: becomes part of the names of the weights ("fp16": ``model.fp16.safetensors``).

    Returns:
        The tensors written, under "component/name", and the files of ``source`` that are not in ``target``.

    Raises:
        CheckpointError: a file cannot be read, a component has no weights or none that can be chosen, or a
            value is NaN, infinite or too large for ``dtype``.
        OutputError: the target exists or cannot be written; nothing is left there.
    """
    infix = variant_infix(variant)
    weights = {component: component_files(source, component) for component in source.components}
    done = {file for files in weights.values() for file in files}
    tensors: dict[str, TensorInfo] = {}
    with atomic_folder(target) as new:
        for relative in _known_files(source):
            _copy(safe_join(source.path, relative, quote(source.path)), new / relative)
            done.add(source.path / relative)
        for component, files in weights.items():
            written = _convert_component(files, new / component, dtype, infix, advance)
            tensors |= {f"{component}/{name}": info for name, info in written.items()}
    return tensors, _left_out(source, done)


def component_files(folder: CheckpointFolder, component: str) -> list[Path]:
    """The weights of a component: those without a variant, else those of the only variant that there is.

    None for a component that has no weights: a tokenizer, a scheduler, or one whose folder is not there.

    Raises:
        CheckpointNotFoundError: there is a configuration and no weights, or several variants to choose from.
        UnsafeCheckpointError: there are only pickles.
    """
    path = folder.folder(component)
    if not (path / "config.json").is_file():
        return []
    variants = folder.variants(component)
    if len(variants) > 1 and None not in variants:
        there = ", ".join(quote(variant) for variant in variants)
        raise CheckpointNotFoundError(
            f"{quote(path)} has weights of several variants ({there}) and none without: keep one of them"
        )
    return folder.weight_files(component, None if None in variants or not variants else variants[0])


def _convert_component(
    files: Sequence[Path], folder: Path, dtype: torch.dtype, infix: str, advance: Callable[[int], object]
) -> dict[str, TensorInfo]:
    """Write the weights of one component, shard by shard, with an index of several."""
    if not files:
        return {}
    stem = "model" if files[0].name.startswith("model") else "diffusion_pytorch_model"
    count, tensors, weight_map = len(files), {}, {}
    for number, file in enumerate(files, start=1):
        shard = f"-{number:05d}-of-{count:05d}" if count > 1 else ""
        name = f"{stem}{infix}{shard}.safetensors"
        written = convert_file(file, folder / name, dtype, advance)
        if repeated := next((key for key in written if key in tensors), None):
            raise CheckpointCorruptError(f"{quote(file)} repeats {quote(repeated)} of a shard before it")
        tensors |= written
        weight_map |= dict.fromkeys(written, name)
    if count > 1:
        total = sum(info.nbytes for info in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / f"{stem}.safetensors.index{infix}.json", index)
    return tensors


def _retyped(info: TensorInfo, dtype: torch.dtype | None) -> TensorInfo:
    if dtype is None or info.dtype not in _FLOATS:
        return info
    size = info.nbytes // ITEM_BYTES[info.dtype] * dtype.itemsize
    return TensorInfo(NAMES[dtype], info.shape, size)


def _read_pieces(source: Path, info: TensorInfo, begin: int) -> Iterator[Tensor]:
    with _opened(source) as file:
        file.seek(begin)
        for start in range(0, info.nbytes, PIECE_BYTES):
            buffer = bytearray(min(PIECE_BYTES, info.nbytes - start))
            if file.readinto(buffer) != len(buffer):
                raise CheckpointCorruptError(f"{quote(source)} became shorter while it was read")
            yield torch.frombuffer(buffer, dtype=_FLOATS.get(info.dtype, torch.uint8))


@contextmanager
def _opened(path: Path) -> Iterator[BufferedReader]:
    """A file to read; an error is told apart from one of the file that is written meanwhile."""
    try:
        file = open(path, "rb")  # noqa: SIM115
    except OSError as error:
        raise CheckpointNotFoundError(f"{quote(path)} cannot be read: {error.strerror or error}") from error
    with file:
        yield file


def _known_files(folder: CheckpointFolder) -> list[str]:
    """The files to copy, relative to the folder."""
    known = ["model_index.json"]
    for component in folder.components:
        path = folder.folder(component)
        names = (
            sorted(_KNOWN_FILES.intersection(file.name for file in path.iterdir())) if path.is_dir() else []
        )
        known += [f"{component}/{name}" for name in names]
    return known


def _copy(source: Path, target: Path) -> None:
    with _opened(source) as old, atomic_write(target) as new:
        shutil.copyfileobj(old, new)


def _left_out(folder: CheckpointFolder, done: set[Path]) -> list[str]:
    """What lies in the folder and its components and was neither copied nor converted."""
    components = {folder.path / component for component in folder.components}
    parents = [path for path in (folder.path, *components) if path.is_dir()]
    files = {file for parent in parents for file in parent.iterdir()} - done - components
    names = (str(file.relative_to(folder.path)) for file in files)
    return sorted(name for name in names if ".safetensors.index" not in name)
