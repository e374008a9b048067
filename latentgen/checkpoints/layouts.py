"""Whole checkpoints from one layout into the other: a folder in the diffusers layout, and a single file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from latentgen.checkpoints.folder import SCHEDULERS, TOKENIZERS, Checkpoint, CheckpointFolder, config_name
from latentgen.checkpoints.headers import TensorInfo
from latentgen.checkpoints.key_map import to_original
from latentgen.checkpoints.original_layout import original_key_maps
from latentgen.checkpoints.precision import write_tensors
from latentgen.checkpoints.single_file import SingleFile
from latentgen.checkpoints.weights import DTYPE_NAMES, variant_infix
from latentgen.diffusion.scheduler_config import prediction_type
from latentgen.errors import ConfigError
from latentgen.files import atomic_folder, atomic_write, quote, write_json
from latentgen.models.text import CLIPText, CLIPTextConfig, save_tokenizer
from latentgen.models.unet import UNet
from latentgen.models.unet_config import UNetConfig
from latentgen.models.vae import DECODER_KEYS, ENCODER_KEYS, VAEConfig, VAEDecoder, VAEEncoder

# How single files say what the UNet predicts.
_STATED = {"epsilon": "epsilon", "v_prediction": "v"}


class Written(NamedTuple):
    """How many tensors were written, and the components of the source that the new layout has no place for."""

    tensors: int
    left_out: tuple[str, ...]


def write_single_file(
    folder: CheckpointFolder, target: Path, dtype: torch.dtype | None, advance: Callable[[int], object]
) -> Written:
    """Write the weights of a folder as one file in the original layout.

    The configurations, which such a file does not hold, are lost: it can be read again if the model is of a published
    family. What the UNet predicts is kept in the metadata, as `modelspec.prediction_type`.

    Args:
        dtype: what floating-point tensors become; None keeps each one's own.
        advance: called with the bytes of each piece when it is written.

    Raises:
        CheckpointError: the folder's weights are not those of its configurations, or cannot be read.
        ConfigError: a configuration holds what is not implemented, or what the original layout has no place for.
        OutputError: the target cannot be written; what stood there is intact.
    """
    names = ("unet", "vae", *TOKENIZERS)
    configs = {name: folder.config(name) for name in names if name in folder.components}
    state: dict[str, Tensor] = {}
    for component, key_map in original_key_maps(configs).items():
        state |= to_original(_state(folder, component), key_map)
    metadata = {"format": "pt"}
    if "scheduler" in folder.components:
        prediction = prediction_type(folder.config("scheduler"))
        if prediction not in _STATED:
            raise ConfigError(
                f"{quote(folder.path)}: prediction_type is {quote(prediction)}; single files have {', '.join(_STATED)}"
            )
        metadata["modelspec.prediction_type"] = _STATED[str(prediction)]
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
        advance: called with the bytes of each piece when it is written.

    Raises:
        CheckpointError: the file's weights are not those of its family, or cannot be read.
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
    """The weights of one component by the names of the diffusers layout: views of the file, checked strictly."""
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
    infos = {
        name: TensorInfo(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), tensor.nbytes)
        for name, tensor in state.items()
    }
    with atomic_write(path) as file:
        write_tensors(
            file,
            infos,
            metadata,
            lambda name: (state[name].detach().contiguous().flatten(),),
            dtype=dtype,
            source=source,
            advance=advance,
        )
