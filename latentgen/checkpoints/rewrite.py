"""Writes checkpoints in another precision or layout; memory holds a piece of a tensor, never a file."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from latentgen.checkpoints.folder import SCHEDULERS, TOKENIZERS, Checkpoint, CheckpointFolder, config_name
from latentgen.checkpoints.io import (
    TensorInfo,
    open_checkpoint,
    read_header,
    read_pieces,
    write_pieces,
    write_tensors,
)
from latentgen.checkpoints.key_map import original_key_maps, to_original
from latentgen.checkpoints.single_file import SingleFile
from latentgen.checkpoints.weights import variant_infix
from latentgen.diffusion.scheduler_config import prediction_type
from latentgen.errors import CheckpointCorruptError, CheckpointNotFoundError, ConfigError
from latentgen.files import atomic_folder, atomic_write, quote, safe_join, write_json
from latentgen.models.config import CLIPTextConfig, VAEConfig
from latentgen.models.text import CLIPText
from latentgen.models.text_loading import save_tokenizer
from latentgen.models.unet import UNet
from latentgen.models.unet_config import UNetConfig
from latentgen.models.vae import DECODER_KEYS, ENCODER_KEYS, VAEDecoder, VAEEncoder

# The files of a folder in the diffusers layout that are copied, apart from weights.
_KNOWN_FILES = frozenset(
    {
        *("config.json", "generation_config.json", "scheduler_config.json", "preprocessor_config.json"),
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
        *("vocab.json", "merges.txt", "spiece.model"),
    }
)


class Written(NamedTuple):
    """The number of tensors written, and the files or components of the source that were left out."""

    tensors: int
    left_out: tuple[str, ...]


def convert_file(
    source: Path, target: Path, dtype: torch.dtype | None, advance: Callable[[int], object]
) -> dict[str, TensorInfo]:
    """Write a safetensors file in another precision; names, metadata and integers stay as they are.

    Returns:
        The tensors written.

    Raises:
        CheckpointError: the file cannot be read, or a value is NaN, infinite or too large for ``dtype``.
        OutputError: the target cannot be written; existing files are never damaged.
    """
    header = read_header(source)
    with atomic_write(target) as file:
        return write_pieces(
            file,
            header,
            lambda name: read_pieces(source, header, name),
            header.metadata,
            dtype=dtype,
            checked_source=source,
            advance=advance,
        )


def convert_folder(
    source: CheckpointFolder,
    target: Path,
    dtype: torch.dtype | None,
    variant: str | None,
    advance: Callable[[int], object],
) -> Written:
    """Write a folder in the diffusers layout in another precision; other files are copied unchanged.

    Args:
        variant: becomes part of the names of the weights ("fp16": ``model.fp16.safetensors``).

    Returns:
        How many tensors were written, and the files of ``source`` that are not in ``target``.

    Raises:
        CheckpointError: a file cannot be read, a component has no weights or none that can be chosen, or a
            value is NaN, infinite or too large for ``dtype``.
        OutputError: the target exists or cannot be written; nothing is left there.
    """
    infix = variant_infix(variant)
    weights = {component: component_files(source, component) for component in source.components}
    done = {file for files in weights.values() for file in files}
    count = 0
    with atomic_folder(target) as new:
        for relative in _known_files(source):
            _copy(safe_join(source.path, relative, quote(source.path)), new / relative)
            done.add(source.path / relative)
        for component, files in weights.items():
            count += _convert_component(files, new / component, dtype, infix, advance)
    return Written(count, _left_out(source, done))


def component_files(folder: CheckpointFolder, component: str) -> list[Path]:
    """The weight files of a component: those without a variant, else those of its only variant.

    Empty for a component without weights: a tokenizer, a scheduler, or one without a folder.

    Raises:
        CheckpointNotFoundError: there is a configuration without weights, or several variants.
        UnsafeCheckpointError: there are only pickles.
    """
    path = folder.folder(component)
    if not (path / "config.json").is_file():
        return []
    variants = folder.variants(component)
    if len(variants) > 1 and None not in variants:
        there = ", ".join(quote(variant) for variant in variants)
        raise CheckpointNotFoundError(
            f"{quote(path)} has weights only as several variants ({there}); keep one of them"
        )
    return folder.weight_files(component, None if None in variants or not variants else variants[0])


def _convert_component(
    files: Sequence[Path],
    folder: Path,
    dtype: torch.dtype | None,
    infix: str,
    advance: Callable[[int], object],
) -> int:
    """Write the weights of one component, shard by shard, with an index of several; returns the number of tensors."""
    if not files:
        return 0
    stem = "model" if files[0].name.startswith("model") else "diffusion_pytorch_model"
    count = len(files)
    tensors: dict[str, TensorInfo] = {}
    weight_map: dict[str, str] = {}
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
    return len(tensors)


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
    with open_checkpoint(source) as old, atomic_write(target) as new:
        shutil.copyfileobj(old, new)


def _left_out(folder: CheckpointFolder, done: set[Path]) -> tuple[str, ...]:
    """Files in the folder and its components that were neither copied nor converted."""
    components = {folder.path / component for component in folder.components}
    parents = [path for path in (folder.path, *components) if path.is_dir()]
    files = {file for parent in parents for file in parent.iterdir()} - done - components
    names = (str(file.relative_to(folder.path)) for file in files)
    return tuple(sorted(name for name in names if ".safetensors.index" not in name))


# prediction_type -> its name in the metadata of single files.
_DECLARED = {"epsilon": "epsilon", "v_prediction": "v"}


def write_single_file(
    folder: CheckpointFolder, target: Path, dtype: torch.dtype | None, advance: Callable[[int], object]
) -> Written:
    """Write the weights of a folder as one file in the original layout.

    Configurations are left out, so the file can only be read again if the model is of a published family. The metadata
    holds the prediction type, as `modelspec.prediction_type`.

    Args:
        dtype: what floating-point tensors become; None keeps each one's own.
        advance: called with the number of bytes of each piece after it is written.

    Raises:
        CheckpointError: the folder's weights do not match its configurations, or cannot be read.
        ConfigError: a configuration is not implemented, or the original layout cannot represent it.
        OutputError: the target cannot be written; existing files are never damaged.
    """
    names = ("unet", "vae", *TOKENIZERS)
    configs = {name: folder.config(name) for name in names if name in folder.components}
    state: dict[str, Tensor] = {}
    for component, key_map in original_key_maps(configs).items():
        state |= to_original(_state(folder, component), key_map)
    metadata = {"format": "pt"}
    if "scheduler" in folder.components:
        prediction = prediction_type(folder.config("scheduler"))
        if prediction not in _DECLARED:
            raise ConfigError(
                f"{quote(folder.path)}: prediction_type {quote(prediction)}; allowed in single files are "
                f"{', '.join(_DECLARED)}"
            )
        metadata["modelspec.prediction_type"] = _DECLARED[str(prediction)]
    _write(target, state, metadata, dtype, folder.path, advance)
    kept = {*configs, *TOKENIZERS.values(), "scheduler"}
    return Written(len(state), tuple(name for name in folder.components if name not in kept))


def write_folder(
    file: SingleFile,
    target: Path,
    dtype: torch.dtype | None,
    variant: str | None,
    advance: Callable[[int], object],
) -> Written:
    """Write a single file as a new folder in the diffusers layout, with the configurations of its family.

    Args:
        dtype: what floating-point tensors become; None keeps each one's own.
        variant: becomes part of the names of the weights ("fp16": ``model.fp16.safetensors``).
        advance: called with the number of bytes of each piece after it is written.

    Raises:
        CheckpointError: the file's weights do not match its family, or cannot be read.
        OutputError: the target exists or cannot be written; nothing is left there.
    """
    count, infix = 0, variant_infix(variant)
    with atomic_folder(target) as new:
        for component in file.components:
            if component in TOKENIZERS.values():
                save_tokenizer(file.tokenizer(component), new / component)
                continue
            write_json(new / component / config_name(component), file.config(component))
            if component not in SCHEDULERS:
                state = _state(file, component)
                stem = "model" if component in TOKENIZERS else "diffusion_pytorch_model"
                path = new / component / f"{stem}{infix}.safetensors"
                _write(path, state, {"format": "pt"}, dtype, file.path, advance)
                count += len(state)
        write_json(new / "model_index.json", file.model_index)
    return Written(count, ())


def _state(checkpoint: Checkpoint, component: str) -> dict[str, Tensor]:
    """The weights of one component under diffusers' names: views of the file, checked strictly."""
    config, weights = checkpoint.config(component), checkpoint.weights(component)
    if component in TOKENIZERS:
        tokenizer = checkpoint.tokenizer(TOKENIZERS[component])
        return CLIPText.from_weights(CLIPTextConfig.from_json(config), tokenizer, weights).state_dict()
    with torch.device("meta"):
        if component == "unet":
            unet = UNet(UNetConfig.from_json(config))
        else:
            fields = VAEConfig.from_json(config)
            encoder, decoder = VAEEncoder(fields), VAEDecoder(fields)
    if component == "unet":
        weights.load_into(unet)
        return unet.state_dict()
    weights.load_into(encoder, prefixes=ENCODER_KEYS, ignored_prefixes=DECODER_KEYS)
    weights.load_into(decoder, prefixes=DECODER_KEYS, ignored_prefixes=ENCODER_KEYS)
    return {**encoder.state_dict(), **decoder.state_dict()}


def _write(
    path: Path,
    state: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    dtype: torch.dtype | None,
    source: Path,
    advance: Callable[[int], object],
) -> None:
    with atomic_write(path) as file:
        write_tensors(file, state, metadata, dtype=dtype, checked_source=source, advance=advance)
