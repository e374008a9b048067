"""Loads safetensors files into modules, memory-mapped and strict, and saves weights atomically."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

from latentgen.checkpoints.identify import likely_architecture
from latentgen.checkpoints.io import (
    DTYPE_NAMES,
    MAX_TENSORS,
    MappedFile,
    TensorInfo,
    check_values,
    read_header,
    write_tensors,
)
from latentgen.checkpoints.key_map import KeyMap, KeySource
from latentgen.errors import (
    CheckpointCorruptError,
    CheckpointMismatchError,
    InputError,
    OutputError,
)
from latentgen.files import atomic_write, encode_json, quote

MAX_SHARD_BYTES = 10_000_000_000
LOADING_THREADS = 4
_VARIANT = re.compile(r"[A-Za-z0-9_-]{1,32}")
_LEGACY_VAE_ATTENTION = re.compile(r"(.*\battentions\.\d+\.)(query|key|value|proj_attn)\.(weight|bias)")
_LEGACY_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_VAE_PROJECTION = re.compile(r".*\battentions\.\d+\.to_(q|k|v|out\.0)\.weight")


@dataclass(frozen=True)
class Weights:
    """The files that hold the weights of one component.

    Attributes:
        files: one, or several shards.
        key_map: None if the files are in the diffusers layout.
    """

    files: tuple[Path, ...]
    key_map: KeyMap | None = None

    def tensors(self) -> dict[str, TensorInfo]:
        """The tensors by their names in the diffusers layout; reads only the headers.

        Raises:
            CheckpointNotFoundError, CheckpointCorruptError, UnsafeCheckpointError: a file cannot be read.
        """
        result: dict[str, TensorInfo] = {}
        for file in self.files:
            header = read_header(file)
            for name, source in _key_sources(header, self.key_map):
                info = header[source.key]
                result[name] = info._replace(
                    shape=source.shape(info.shape),
                    nbytes=info.nbytes if source.qkv_index is None else info.nbytes // 3,
                )
        return result

    def load_into(
        self,
        module: nn.Module,
        *,
        prefixes: tuple[str, ...] = ("",),
        ignored_prefixes: tuple[str, ...] = (),
        rename: Callable[[str], str] | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        memory_format: torch.memory_format = torch.preserve_format,
    ) -> None:
        """Load a module, as :func:`load_weights` does."""
        load_weights(
            module,
            self.files,
            prefixes=prefixes,
            ignored_prefixes=ignored_prefixes,
            dtype=dtype,
            device=device,
            memory_format=memory_format,
            rename=rename,
            key_map=self.key_map,
        )


def load_weights(
    module: nn.Module,
    files: Iterable[Path],
    *,
    prefixes: tuple[str, ...] = ("",),
    ignored_prefixes: tuple[str, ...] = (),
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    memory_format: torch.memory_format = torch.preserve_format,
    rename: Callable[[str], str] | None = None,
    key_map: KeyMap | None = None,
) -> None:
    """Assign the tensors of safetensors files to ``module``, which is best built on the meta device.

    The tensors are views of the memory-mapped files: nothing is copied unless ``dtype``, ``device`` or
    ``memory_format`` asks for it, and memory then holds a few tensors twice, never all. Everything is checked before
    the first assignment, so a failure leaves the module as it was.

    Args:
        prefixes: keys with one of these prefixes belong to ``module``; the prefix stays in the name.
        ignored_prefixes: keys of other components, which are skipped; any other key is an error.
        dtype: what floating-point tensors become; None keeps the dtype of the file.
        memory_format: of tensors with four dimensions, as convolution kernels have.
        rename: maps a key of the file to a name in ``module``, after the selection by prefix.
        key_map: for files in another layout: its names take the place of the keys in the arguments above, and other
            keys of a file are ignored.

    Raises:
        CheckpointNotFoundError, CheckpointCorruptError, UnsafeCheckpointError: a file cannot be read.
        CheckpointMismatchError: missing, extra or misshapen keys, or buffers that would stay on meta.
        CheckpointValueError: a weight is NaN or infinite, or does not fit into ``dtype``.
    """
    expected = module.state_dict()
    if unmade := [name for name, buffer in module.named_buffers() if buffer.is_meta and name not in expected]:
        raise CheckpointMismatchError(
            f"{type(module).__name__} keeps {first_five(unmade)} on the meta device, which no checkpoint "
            "holds; make these buffers before the weights are loaded"
        )
    mapped = [MappedFile(file) for file in files]
    sources = _match(mapped, expected, prefixes, ignored_prefixes, rename, key_map)

    def load(file: MappedFile, name: str, source: KeySource) -> tuple[str, Tensor]:
        stored = file.tensor(source.key)
        tensor = source.take(stored)
        check_values(tensor, dtype, source.key, file.path)
        placed = tensor.to(
            device=device,
            dtype=dtype if tensor.is_floating_point() else None,
            memory_format=memory_format if tensor.ndim == 4 else torch.preserve_format,
        )
        if placed.untyped_storage().data_ptr() != stored.untyped_storage().data_ptr():
            file.release(source.key)
        return name, placed

    # Reading pages, checking values and copying release the GIL.
    with ThreadPoolExecutor(LOADING_THREADS) as pool:
        state = dict(pool.map(lambda source: load(*source), sources))
    module.load_state_dict(state, strict=True, assign=True)


def save_weights(
    state: Mapping[str, Tensor],
    folder: str | Path,
    stem: str,
    *,
    variant: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    metadata: Mapping[str, str] | None = None,
) -> list[Path]:
    """Write ``state`` to ``folder/stem[.variant].safetensors``, or to shards with an index when it is larger.

    All files reach the disk under temporary names before the first one is renamed; the weights that an
    earlier call left under the same stem and variant are replaced. One tensor at a time is copied to the CPU.
    ``metadata`` is text for the header of every file.

    Returns:
        The safetensors files written, in order.

    Raises:
        InputError: a dtype that the format lacks, no tensors, or an invalid variant.
        OutputError: the folder cannot be written; the old files are intact.
    """
    folder, infix = Path(folder), variant_infix(variant)
    if not state or len(state) > MAX_TENSORS:
        raise InputError(f"{len(state):,} tensors cannot be saved; allowed are 1 to {MAX_TENSORS:,}")
    shards = _split(state, max_shard_bytes)
    if len(shards) == 1:
        names = [f"{stem}{infix}.safetensors"]
    else:
        names = [f"{stem}{infix}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    index = folder / f"{stem}.safetensors.index{infix}.json"
    with ExitStack() as stack:  # closes in reverse order: the index appears after all of its shards
        if len(shards) > 1:
            _write_index(stack.enter_context(atomic_write(index)), names, shards)
        for name, shard in zip(names, shards, strict=True):
            file = stack.enter_context(atomic_write(folder / name))
            write_tensors(file, {key: state[key] for key in shard}, {"format": "pt", **(metadata or {})})
            file.flush()
            os.fsync(file.fileno())  # a full disk has to fail before the first of several shards is renamed
    _remove_weights(folder, stem, variant, keep={*names, index.name} if len(shards) > 1 else {*names})
    return [folder / name for name in names]


def variant_infix(variant: str | None) -> str:
    """The part of a file's name for a variant: ".fp16" for "fp16", nothing for None; InputError if malformed."""
    if variant is None:
        return ""
    if not isinstance(variant, str) or not _VARIANT.fullmatch(variant):
        raise InputError(f"variant {quote(variant)} is not a name like 'fp16' (letters, digits, '-' and '_')")
    return f".{variant}"


def _match(
    files: Sequence[MappedFile],
    expected: Mapping[str, Tensor],
    prefixes: tuple[str, ...],
    ignored_prefixes: tuple[str, ...],
    rename: Callable[[str], str] | None,
    key_map: KeyMap | None,
) -> list[tuple[MappedFile, str, KeySource]]:
    """The names in the module and where they come from; every name is covered exactly once."""
    sources: list[tuple[MappedFile, str, KeySource]] = []
    actual: dict[str, TensorInfo] = {}
    extra: dict[str, TensorInfo] = {}
    for file in files:
        for label, source in _key_sources(file.header, key_map):
            if label.startswith(ignored_prefixes):
                continue
            name = _current_name(rename(label) if rename else label)
            if key_map is None and _VAE_PROJECTION.fullmatch(name):
                source = source._replace(convolution=True)  # as old files hold them
            info = file.header[source.key]
            if not label.startswith(prefixes) or name not in expected:
                extra[source.key] = info
            elif name in actual:
                raise CheckpointCorruptError(f"{quote(file.path)}: {quote(source.key)} repeats {quote(name)}")
            else:
                sources.append((file, name, source))
                actual[name] = info._replace(shape=source.shape(info.shape))
    if problems := _problems(expected, actual, extra):
        where = ", ".join(quote(file.path) for file in files) or "no file"
        likely = likely_architecture(actual | extra)
        hint = f". This is probably {likely}; use its configuration" if likely else ""
        raise CheckpointMismatchError(
            f"{where}: {len(actual)} of the {len(expected)} expected tensors are present: {problems}{hint}"
        )
    return sources


def _key_sources(header: Mapping[str, TensorInfo], key_map: KeyMap | None) -> Iterable[tuple[str, KeySource]]:
    """The tensors of a file by their names in the diffusers layout."""
    if key_map is None:
        return ((key, KeySource(key)) for key in header)
    return ((name, source) for name, source in key_map.items() if source.key in header)


def _current_name(name: str) -> str:
    """The current name of VAE attention, which has other names in folders of early diffusers releases."""
    if match := _LEGACY_VAE_ATTENTION.fullmatch(name):
        block, projection, kind = match.groups()
        return f"{block}{_LEGACY_NAMES[projection]}.{kind}"
    return name


def _problems(expected: Mapping[str, Tensor], actual: Mapping[str, TensorInfo], extra: Iterable[str]) -> str:
    """How the tensors of the files differ from those expected: counts and the first five; empty if none."""
    missing = [name for name in expected if name not in actual]
    misshapen = [
        f"{name} is {info.dtype} {list(info.shape)} where {list(expected[name].shape)} is expected"
        for name, info in actual.items()
        if not _fits(info, expected[name])
    ]
    kinds = {"missing": missing, "extra": list(extra), "misshapen": misshapen}
    return ", ".join(f"{len(names)} {kind} ({first_five(names)})" for kind, names in kinds.items() if names)


def first_five(names: Sequence[str]) -> str:
    """The first five names, for an error message."""
    return "; ".join(quote(name)[1:-1] for name in names[:5]) + ("; ..." if len(names) > 5 else "")


def _fits(info: TensorInfo, expected: Tensor) -> bool:
    same_kind = info.dtype.startswith(("F", "BF")) == expected.is_floating_point()
    return info.shape == tuple(expected.shape) and same_kind


def _split(state: Mapping[str, Tensor], max_shard_bytes: int) -> list[dict[str, TensorInfo]]:
    """Tensors in their order, cut into shards of at most ``max_shard_bytes`` (or of one larger tensor)."""
    shards: list[dict[str, TensorInfo]] = [{}]
    size = 0
    for name, tensor in state.items():
        if tensor.dtype not in DTYPE_NAMES or tensor.numel() == 0 or tensor.is_meta:
            raise InputError(
                f"tensor {quote(name)} ({tensor.dtype}, {list(tensor.shape)}, {tensor.device}) cannot be "
                f"saved: it needs values and one of the dtypes {', '.join(DTYPE_NAMES.values())}"
            )
        info = TensorInfo(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), tensor.nbytes)
        if shards[-1] and size + info.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = info
        size += info.nbytes
    return shards


def _write_index(file: BinaryIO, names: Sequence[str], shards: Sequence[Mapping[str, TensorInfo]]) -> None:
    total = sum(info.nbytes for shard in shards for info in shard.values())
    weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    file.write(encode_json({"metadata": {"total_size": total}, "weight_map": weight_map}))


def _remove_weights(folder: Path, stem: str, variant: str | None, *, keep: Collection[str]) -> None:
    """Delete the files of an earlier save under this stem and variant, which would be read with the new ones."""
    base, infix = re.escape(stem), re.escape(variant_infix(variant))
    weights = rf"{base}{infix}(-\d{{5}}-of-\d{{5}})?\.safetensors"
    index = rf"{base}(\.safetensors\.index{infix}|{infix}\.safetensors\.index)\.json"
    for file in list(folder.iterdir()):
        if file.name not in keep and re.fullmatch(f"{weights}|{index}", file.name):
            try:
                file.unlink()
            except OSError as error:
                raise OutputError(f"{quote(file)} is outdated and cannot be deleted: {error}") from error
