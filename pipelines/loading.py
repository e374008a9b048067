"""Stages out of a folder in the diffusers layout, and back into one."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from latentgen.checkpoint import Checkpoint, CheckpointFolder, read_header, save_weights, write_json
from latentgen.diffusion.scheduler import Scheduler
from latentgen.errors import ConfigError
from latentgen.files import quote
from latentgen.models.packing import can_pack, pack_convolutions
from latentgen.models.text import CLIPText, CLIPTextConfig
from latentgen.models.unet import UNet
from latentgen.models.unet_config import UNetConfig
from latentgen.models.vae import VAEConfig, VAEDecoder, VAEEncoder

WEIGHTS_STEM = "diffusion_pytorch_model"
_DECODER_KEYS = ("decoder.", "post_quant_conv.")
_ENCODER_KEYS = ("encoder.", "quant_conv.")
# Components that the pipelines here read, and those that they do without.
_USED = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
_IGNORED = ("safety_checker", "feature_extractor", "image_encoder")


class Placement(NamedTuple):
    """How stages are loaded: in which dtype, onto which device, which variant of the files, whether to work faster.

    `pack` lets convolutions on a CPU keep a second copy of their weights; see MemoryPolicy.
    """

    dtype: torch.dtype
    device: torch.device
    variant: str | None = None
    pack: bool = False


def check_class(folder: CheckpointFolder, pipeline_class: str) -> None:
    """Compare what `model_index.json` says the folder is with the one class that a pipeline reads.

    Raises:
        ConfigError: another class of pipeline, or components that this one knows nothing of.
    """
    index = quote(folder.path / "model_index.json")
    found = folder.model_index.get("_class_name")
    if found != pipeline_class:
        raise ConfigError(f"{index}: _class_name is {quote(found)}; this pipeline reads {pipeline_class}")
    if unknown := [name for name in folder.components if name not in _USED + _IGNORED]:
        raise ConfigError(
            f"{index}: {quote(unknown[0])} is no component of {pipeline_class} that is known here"
        )


def load_unet(folder: CheckpointFolder, placement: Placement) -> UNet:
    """The UNet of a folder."""
    with torch.device("meta"):
        unet = UNet(UNetConfig.from_json(folder.config("unet")))
    _load(unet, folder, "unet", placement)
    return unet


def load_decoder(folder: CheckpointFolder, placement: Placement) -> VAEDecoder:
    """The decoder of a folder's VAE; the encoder's part of the file is passed over."""
    with torch.device("meta"):
        decoder = VAEDecoder(VAEConfig.from_json(folder.config("vae")))
    _load(decoder, folder, "vae", placement, prefixes=_DECODER_KEYS, ignored_prefixes=_ENCODER_KEYS)
    return decoder


def load_encoder(folder: CheckpointFolder, placement: Placement) -> VAEEncoder:
    """The encoder of a folder's VAE; the decoder's part of the file is passed over."""
    with torch.device("meta"):
        encoder = VAEEncoder(VAEConfig.from_json(folder.config("vae")))
    _load(encoder, folder, "vae", placement, prefixes=_ENCODER_KEYS, ignored_prefixes=_DECODER_KEYS)
    return encoder


def load_text_encoder(folder: CheckpointFolder, placement: Placement) -> CLIPText:
    """The text encoder of a folder, with its tokenizer."""
    encoder = CLIPText.from_folders(
        CLIPTextConfig.from_json(folder.config("text_encoder")),
        folder.folder("tokenizer"),
        folder.weight_files("text_encoder", placement.variant),
        dtype=placement.dtype,
        device=placement.device,
    )
    encoder.model.requires_grad_(False)
    return encoder


def load_scheduler(folder: CheckpointFolder) -> Scheduler:
    """The scheduler of a Stable Diffusion folder.

    Old folders carry a steps_offset of 0 and clip_sample, which the model was not trained with; diffusers'
    StableDiffusionPipeline reads them as 1 and false, and so they are read here.
    """
    scheduler = Scheduler.from_config(folder.config("scheduler"))
    return replace(scheduler, steps_offset=1, clipping=replace(scheduler.clipping, clip_sample=False))


def weight_bytes(folder: CheckpointFolder, placement: Placement) -> int:
    """A lower bound of the memory that the stages take: the weights of UNet and text encoder."""
    headers = [
        read_header(file)
        for component in ("unet", "text_encoder")
        for file in folder.weight_files(component, placement.variant)
    ]
    count = sum(math.prod(info.shape) for header in headers for info in header.values())
    return count * placement.dtype.itemsize


def _load(
    module: nn.Module,
    folder: Checkpoint,
    component: str,
    placement: Placement,
    *,
    prefixes: tuple[str, ...] = ("",),
    ignored_prefixes: tuple[str, ...] = (),
) -> None:
    folder.weights(component, placement.variant).load_into(
        module,
        prefixes=prefixes,
        ignored_prefixes=ignored_prefixes,
        dtype=placement.dtype,
        device=placement.device,
    )
    module.eval().requires_grad_(False)
    if placement.pack and can_pack(placement.dtype):
        pack_convolutions(module)
    else:
        # Kernels for channels_last images would otherwise rearrange the weights at every call.
        module.to(memory_format=torch.channels_last)


def save_folder(
    folder: Path,
    *,
    unet: UNet,
    encoder: VAEEncoder,
    decoder: VAEDecoder,
    text_encoder: CLIPText,
    scheduler: Scheduler,
    variant: str | None,
) -> None:
    """Write a folder that diffusers' StableDiffusionPipeline loads; `model_index.json` comes last.

    Raises:
        OutputError: a file could not be written; it keeps its old content, as do those that follow it.
    """
    save_weights(unet.state_dict(), folder / "unet", WEIGHTS_STEM, variant=variant)
    write_json(folder / "unet" / "config.json", unet.config.to_json())
    vae = {**encoder.state_dict(), **decoder.state_dict()}
    save_weights(vae, folder / "vae", WEIGHTS_STEM, variant=variant)
    write_json(folder / "vae" / "config.json", decoder.config.to_json())
    text_encoder.save(folder / "text_encoder", folder / "tokenizer", variant=variant)
    config = scheduler.to_config()
    write_json(folder / "scheduler" / "scheduler_config.json", config)
    write_json(folder / "model_index.json", _model_index(str(config["_class_name"])))


def _model_index(scheduler_class: str) -> dict[str, object]:
    return {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", scheduler_class],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
