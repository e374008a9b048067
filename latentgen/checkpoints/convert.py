"""Converts checkpoints: pickles to safetensors, one layout to another, one precision to another.

Weights are mapped and written piece by piece: memory never holds a whole file.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import Module
from tqdm import tqdm

from latentgen.checkpoints.folder import SCHEDULERS, TOKENIZERS, CheckpointFolder, as_path, config_name
from latentgen.checkpoints.identify import DeclaredPrediction
from latentgen.checkpoints.io import MappedFile, TensorInfo, is_pickle, open_checkpoint, write_tensors
from latentgen.checkpoints.key_map import original_key_maps, to_original
from latentgen.checkpoints.single_file import Checkpoint, SingleFile
from latentgen.checkpoints.unpickle import unpickle
from latentgen.checkpoints.weights import encode_index, index_name, shard_names, variant_infix
from latentgen.diffusion.scheduler_config import prediction_type as scheduler_prediction
from latentgen.errors import (
    CheckpointCorruptError,
    CheckpointNotFoundError,
    ConfigError,
    InputError,
    OutputError,
)
from latentgen.files import atomic_folder, atomic_write, quote, safe_join, write_json
from latentgen.models.config import CLIPTextConfig, VAEConfig
from latentgen.models.text import CLIPText
from latentgen.models.text_loading import save_tokenizer
from latentgen.models.unet import UNet
from latentgen.models.unet_config import UNetConfig
from latentgen.models.vae import DECODER_KEYS, ENCODER_KEYS, VAEDecoder, VAEEncoder

DTypeName = Literal["float32", "float16", "bfloat16"]
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# The files of a component that are copied, apart from weights.
_KNOWN_FILES = (
    *("config.json", "generation_config.json", "scheduler_config.json", "preprocessor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "spiece.model"),
)
# prediction_type -> its name in the metadata of single files.
_DECLARED = {"epsilon": "epsilon", "v_prediction": "v"}


class Conversion(NamedTuple):
    """The file or folder written, its number of tensors, and the parts of the source that were left out."""

    path: Path
    tensors: int
    left_out: tuple[str, ...] = ()


class Writing(NamedTuple):
    """How weights are written.

    Attributes:
        dtype: what floating-point tensors become; None keeps each one's own.
        variant: for folders, part of the names of the weights ("fp16": ``model.fp16.safetensors``).
        advance: called with the number of bytes of each piece after it is written.
    """

    dtype: torch.dtype | None = None
    variant: str | None = None
    advance: Callable[[int], object] | None = None


def convert(
    source: str | Path,
    target: str | Path | None = None,
    *,
    dtype: DTypeName | None = None,
    variant: str | None = None,
    prediction_type: DeclaredPrediction | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> Conversion:
    """Convert a checkpoint; the kind of ``source`` and ``target`` decides how.

    - A pickle (.ckpt, .pt, .pth, .bin) becomes a safetensors file; see :func:`unpickle`.
    - A single file becomes a folder in the diffusers layout, and a folder a single file in the original layout.
    - A safetensors file or a folder becomes the same in another precision; see :func:`convert_folder`.

    Args:
        target: a folder, or a path that ends in .safetensors; None, for pickles only, is :func:`pickle_target`.
        dtype: what floating-point tensors become; None keeps each one's own.
        variant: for folders, becomes part of the names of the weights ("fp16": ``model.fp16.safetensors``).
        prediction_type: of a single file of SD 2.x whose metadata does not declare it.
        overwrite: replace a target file that exists; folders are never replaced.
        progress: show a progress bar.

    Raises:
        InputError: an invalid argument, or a conversion that is not supported.
        UnsafeCheckpointError: a pickle references code that weights do not need; nothing was run.
        CheckpointCorruptError: the source is damaged, holds no weights, or takes too much time or memory.
        CheckpointValueError: a weight is NaN or infinite, or too large for ``dtype``.
        CheckpointError, ConfigError: another problem of the source, in a subclass.
        OutputError: the target exists or cannot be written; existing files are never damaged.
    """
    source = as_path(source)
    if not source.exists():
        raise CheckpointNotFoundError(f"{quote(source)} does not exist; give a checkpoint's file or folder")
    pickled = False
    if source.is_file():
        with open_checkpoint(source) as file:
            pickled = is_pickle(source, file.read(9))
    target = pickle_target(source) if target is None and pickled else target
    to_file = pickled or str(target).endswith(".safetensors")
    if target is None or (not pickled and dtype is None and source.is_file() == to_file):
        raise InputError(
            f"{quote(source)} is not a pickle: give a target and a dtype (--dtype float16) to change its precision, "
            "a folder as the target of a file, or a .safetensors file as the target of a folder"
        )
    target = as_path(target)
    if dtype not in (None, *_DTYPES):
        raise InputError(f"dtype is {quote(dtype)}; allowed are {', '.join(get_args(DTypeName))}")
    _check_target(source, target, variant, overwrite, to_file)
    bar = tqdm(desc="converting", unit="B", unit_scale=True, delay=2, leave=False, disable=not progress)
    writing = Writing(None if dtype is None else _DTYPES[dtype], variant, bar.update)
    with bar:
        if source.is_dir():
            folder = CheckpointFolder.open(source)
            files = (file for component in folder.components for file in _weight_files(folder, component))
            bar.total = sum(file.stat().st_size for file in files)
            return (write_single_file if to_file else convert_folder)(folder, target, writing)
        bar.total = source.stat().st_size
        if pickled:
            return Conversion(target, *unpickle(source, target, writing.dtype, bar.update))
        if to_file:
            return Conversion(target, len(convert_file(source, target, writing)))
        return write_folder(SingleFile.open(source, prediction_type=prediction_type), target, writing)


def pickle_target(source: Path) -> Path:
    """The default target for a pickle: next to it, under its name in the diffusers layout."""
    if source.suffix == ".safetensors":
        return source.with_stem(f"{source.stem}-converted")
    stem = source.stem.removeprefix("pytorch_") if source.stem.startswith("pytorch_model") else source.stem
    return source.with_name(f"{stem}.safetensors")


def _check_target(source: Path, target: Path, variant: str | None, overwrite: bool, to_file: bool) -> None:
    """Refuse a target that exists, is the source or lies in it, has another suffix, or has no variants."""
    variant_infix(variant)
    old, new = source.resolve(), target.resolve()
    if new == old or (not to_file and (new.is_relative_to(old) or old.is_relative_to(new))):
        raise InputError(
            f"{quote(target)} is or contains {quote(source)}, or lies in it; give another target"
        )
    if not to_file:
        return
    if variant is not None:
        raise InputError(f"variant {quote(variant)} is for folders; {quote(target)} is a file")
    if target.suffix != ".safetensors":
        raise InputError(f"target {quote(target)} has to end in .safetensors")
    if target.exists() and not overwrite:
        raise OutputError(f"{quote(target)} exists; give another target, or overwrite it (--force)")


def convert_file(source: Path, target: Path, writing: Writing) -> dict[str, TensorInfo]:
    """Write a safetensors file in another precision; names, metadata and integers stay as they are."""
    mapped = MappedFile(source)
    tensors = {name: mapped.tensor(name) for name in mapped.header}
    return _write(target, tensors, mapped.header.metadata, writing, source)


def convert_folder(source: CheckpointFolder, target: Path, writing: Writing) -> Conversion:
    """Write a folder in the diffusers layout in another precision.

    Integers, metadata and shards stay as they are; configurations and tokenizers are copied byte for byte.
    """
    weights = {component: _weight_files(source, component) for component in source.components}
    known = {source.path / component for component in weights}.union(*weights.values())
    count, left_out = 0, []
    with atomic_folder(target) as new:
        for component in ("", *weights):
            folder = source.path / component
            copied = _KNOWN_FILES if component else ("model_index.json",)
            for file in sorted(folder.iterdir()) if folder.is_dir() else ():
                relative = str(file.relative_to(source.path))
                if file.name in copied:
                    path = safe_join(source.path, relative, quote(source.path))
                    with open_checkpoint(path) as old, atomic_write(new / relative) as copy:
                        shutil.copyfileobj(old, copy)
                elif file not in known and ".safetensors.index" not in file.name:
                    left_out.append(relative)
        for component, files in weights.items():
            count += _convert_shards(files, new / component, writing) if files else 0
    return Conversion(target, count, tuple(sorted(left_out)))


def _weight_files(folder: CheckpointFolder, component: str) -> list[Path]:
    """The weight files of a component: those without a variant, else those of its only variant.

    Empty for a component without weights: a tokenizer, a scheduler, or one without a folder.
    """
    path = folder.folder(component)
    if not (path / "config.json").is_file():
        return []
    variants = folder.variants(component)
    if len(variants) > 1 and None not in variants:
        raise CheckpointNotFoundError(
            f"{quote(path)} has weights only as several variants ({', '.join(map(quote, variants))}); keep one of them"
        )
    return folder.weight_files(component, None if None in variants or not variants else variants[0])


def _convert_shards(files: list[Path], folder: Path, writing: Writing) -> int:
    """Write the weights of one component, with an index of several shards; returns the number of tensors."""
    stem = "model" if files[0].name.startswith("model") else "diffusion_pytorch_model"
    infix, total = variant_infix(writing.variant), 0
    weight_map: dict[str, str] = {}
    for file, name in zip(files, shard_names(stem + infix, len(files)), strict=True):
        written = convert_file(file, folder / name, writing)
        if repeated := written.keys() & weight_map:
            raise CheckpointCorruptError(f"{quote(file)} repeats {quote(min(repeated))} of a shard before it")
        weight_map |= dict.fromkeys(written, name)
        total += sum(info.nbytes for info in written.values())
    if len(files) > 1:
        with atomic_write(folder / index_name(stem, infix)) as index:
            index.write(encode_index(weight_map, total))
    return len(weight_map)


def write_single_file(folder: CheckpointFolder, target: Path, writing: Writing) -> Conversion:
    """Write the weights of a folder as one file in the original layout.

    Configurations are left out, so the file can only be read again if the model is of a published family. The metadata
    holds the prediction type, as `modelspec.prediction_type`.
    """
    names = ("unet", "vae", *TOKENIZERS)
    configs = {name: folder.config(name) for name in names if name in folder.components}
    state: dict[str, Tensor] = {}
    for component, key_map in original_key_maps(configs).items():
        state |= to_original(_state(folder, component), key_map)
    metadata = {"format": "pt"}
    if "scheduler" in folder.components:
        prediction = scheduler_prediction(folder.config("scheduler"))
        if prediction not in _DECLARED:
            raise ConfigError(
                f"{quote(folder.path)}: prediction_type {quote(prediction)}; allowed in single files are "
                f"{', '.join(_DECLARED)}"
            )
        metadata["modelspec.prediction_type"] = _DECLARED[str(prediction)]
    _write(target, state, metadata, writing, folder.path)
    used = {*configs, *TOKENIZERS.values(), "scheduler"}
    return Conversion(target, len(state), tuple(name for name in folder.components if name not in used))


def write_folder(file: SingleFile, target: Path, writing: Writing) -> Conversion:
    """Write a single file as a new folder in the diffusers layout, with the configurations of its family."""
    count = 0
    with atomic_folder(target) as new:
        for component in file.components:
            if component in TOKENIZERS.values():
                save_tokenizer(file.tokenizer(component), new / component)
                continue
            write_json(new / component / config_name(component), file.config(component))
            if component not in SCHEDULERS:
                state = _state(file, component)
                stem = "model" if component in TOKENIZERS else "diffusion_pytorch_model"
                path = new / component / f"{stem}{variant_infix(writing.variant)}.safetensors"
                _write(path, state, {"format": "pt"}, writing, file.path)
                count += len(state)
        write_json(new / "model_index.json", file.model_index)
    return Conversion(target, count)


def _state(checkpoint: Checkpoint, component: str) -> dict[str, Tensor]:
    """The weights of one component under diffusers' names: views of the file, checked strictly."""
    config, weights = checkpoint.config(component), checkpoint.weights(component)
    if component in TOKENIZERS:
        tokenizer = checkpoint.tokenizer(TOKENIZERS[component])
        return CLIPText.from_weights(CLIPTextConfig.from_json(config), tokenizer, weights).state_dict()
    parts: list[tuple[Module, tuple[str, ...]]]
    with torch.device("meta"):
        if component == "unet":
            parts = [(UNet(UNetConfig.from_json(config)), ())]
        else:
            fields = VAEConfig.from_json(config)
            parts = [(VAEEncoder(fields), DECODER_KEYS), (VAEDecoder(fields), ENCODER_KEYS)]
    for module, ignored in parts:
        weights.load_into(module, ignored_prefixes=ignored)
    return {name: tensor for module, _ in parts for name, tensor in module.state_dict().items()}


def _write(
    target: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str], writing: Writing, source: Path
) -> dict[str, TensorInfo]:
    with atomic_write(target) as file:
        return write_tensors(
            file, state, metadata, dtype=writing.dtype, checked_source=source, advance=writing.advance
        )
