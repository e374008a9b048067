"""Loads safetensors files into modules, memory-mapped and strict, and saves weights atomically."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from latentgen.checkpoints.identify import likely_architecture
from latentgen.checkpoints.io import (
    DTYPE_NAMES,
    MAX_TENSORS,
    TORCH_DTYPES,
    MappedFile,
    TensorInfo,
    check_values,
    read_header,
    write_tensors,
)
from latentgen.checkpoints.key_map import KeyMap, KeySource
from latentgen.errors import CheckpointCorruptError, CheckpointMismatchError, InputError, OutputError
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
        """The tensors by their names in the diffusers layout, from the headers; errors as :func:`read_header`."""
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
        ignored_prefixes: tuple[str, ...] = (),
        rename: Callable[[str], str] | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        memory_format: torch.memory_format = torch.preserve_format,
    ) -> None:
        """Assign the tensors of the files to ``module``, which is best built on the meta device.

        The tensors are views of the memory-mapped files: nothing is copied unless ``dtype``, ``device`` or
        ``memory_format`` asks for it, and memory then holds a few tensors twice, never all. A failure leaves the module
        as it was.

        Args:
            ignored_prefixes: of keys of other components, which are skipped; any other key is an error.
            dtype: what floating-point tensors become; None keeps the dtype of the file.
            memory_format: of tensors with four dimensions, as convolution kernels have.
            rename: maps the other keys of the files to names in ``module``.

        With a key map, its names take the place of the keys in these arguments, and other keys of a file are ignored.

        Raises:
            CheckpointNotFoundError, CheckpointCorruptError, UnsafeCheckpointError: a file cannot be read.
            CheckpointMismatchError: missing, extra or misshapen keys, or buffers that would stay on meta.
            CheckpointValueError: a weight is NaN or infinite, or does not fit into ``dtype``.
        """
        expected = module.state_dict()
        if unmade := [
            name for name, buffer in module.named_buffers() if buffer.is_meta and name not in expected
        ]:
            raise CheckpointMismatchError(
                f"{type(module).__name__} keeps {first_five(unmade)} on the meta device, which no checkpoint "
                "holds; make these buffers before the weights are loaded"
            )
        mapped = [MappedFile(file) for file in self.files]
        sources = _match(mapped, expected, ignored_prefixes, rename, self.key_map)

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
    names = shard_names(stem + infix, len(shards))
    index = folder / index_name(stem, infix)
    with ExitStack() as stack:  # closes in reverse order: the index appears after all of its shards
        if len(shards) > 1:
            weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
            total = sum(tensor.nbytes for tensor in state.values())
            stack.enter_context(atomic_write(index)).write(encode_index(weight_map, total))
        for name, shard in zip(names, shards, strict=True):
            file = stack.enter_context(atomic_write(folder / name))
            write_tensors(file, shard, {"format": "pt", **(metadata or {})})
            file.flush()
            os.fsync(file.fileno())  # a full disk has to fail before the first of several shards is renamed
    _remove_weights(folder, stem, infix, keep={*names, index.name} if len(shards) > 1 else {*names})
    return [folder / name for name in names]


def shard_names(stem: str, count: int) -> list[str]:
    """The names of the files with the weights of one component, whose stem includes the variant."""
    if count == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def index_name(stem: str, infix: str) -> str:
    """The name of the index of several shards; ``infix`` is that of the variant."""
    return f"{stem}.safetensors.index{infix}.json"


def encode_index(weight_map: Mapping[str, str], total_bytes: int) -> bytes:
    """The content of the index: the shard of each tensor."""
    return encode_json({"metadata": {"total_size": total_bytes}, "weight_map": weight_map})


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
            if name not in expected:
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
        if info.shape != tuple(expected[name].shape)
        or TORCH_DTYPES[info.dtype].is_floating_point != expected[name].is_floating_point()
    ]
    kinds = {"missing": missing, "extra": list(extra), "misshapen": misshapen}
    return ", ".join(f"{len(names)} {kind} ({first_five(names)})" for kind, names in kinds.items() if names)


def first_five(names: Sequence[str]) -> str:
    """The first five names, for an error message."""
    return "; ".join(quote(name)[1:-1] for name in names[:5]) + ("; ..." if len(names) > 5 else "")


def _split(state: Mapping[str, Tensor], max_shard_bytes: int) -> list[dict[str, Tensor]]:
    """Tensors in their order, cut into shards of at most ``max_shard_bytes`` (or of one larger tensor)."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in state.items():
        if tensor.dtype not in DTYPE_NAMES or tensor.numel() == 0 or tensor.is_meta:
            raise InputError(
                f"tensor {quote(name)} ({tensor.dtype}, {list(tensor.shape)}, {tensor.device}) cannot be "
                f"saved: it needs values and one of the dtypes {', '.join(DTYPE_NAMES.values())}"
            )
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards


def _remove_weights(folder: Path, stem: str, infix: str, *, keep: Collection[str]) -> None:
    """Delete the files of an earlier save under this stem and variant, which would be read with the new ones."""
    base, infix = re.escape(stem), re.escape(infix)
    weights = rf"{base}{infix}(-\d{{5}}-of-\d{{5}})?\.safetensors"
    index = rf"{base}(\.safetensors\.index{infix}|{infix}\.safetensors\.index)\.json"
    for file in list(folder.iterdir()):
        if file.name not in keep and re.fullmatch(f"{weights}|{index}", file.name):
            try:
                file.unlink()
            except OSError as error:
                raise OutputError(f"cannot delete {quote(file)}, left by an earlier save: {error}") from error
