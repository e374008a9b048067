"""Stages out of a checkpoint."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from latentgen.checkpoints.folder import SCHEDULERS, TOKENIZERS, Checkpoint
from latentgen.diffusion.schedule import FlowSchedule
from latentgen.diffusion.scheduler import Scheduler
from latentgen.errors import CheckpointNotFoundError, ConfigError, InputError
from latentgen.files import quote
from latentgen.models.mkldnn_conv import can_pack, pack_convolutions
from latentgen.models.pixels import ImageDecoder, ImageEncoder, PixelDecoder, PixelEncoder
from latentgen.models.text import CLIPText, CLIPTextConfig, TextEncoder, join_towers
from latentgen.models.unet import UNet
from latentgen.models.unet_config import UNetConfig
from latentgen.models.vae import DECODER_KEYS, ENCODER_KEYS, VAEConfig, VAEDecoder, VAEEncoder
from latentgen.pipelines.arguments import check_guidance_scale

# Diffusers has no pipelines from CLIP's text to pixels: under these classes it refuses the folder, and misreads none.
PIXEL_CLASS = "LatentgenPixelPipeline"
PIXEL_PAIRED_CLASS = "LatentgenPixelPairedPipeline"
PIXEL_UPSCALE_CLASS = "LatentgenPixelUpscalePipeline"
PIXEL_CLASSES = (PIXEL_CLASS, PIXEL_PAIRED_CLASS, PIXEL_UPSCALE_CLASS)
# What diffusers guides with where a call names no scale.
USUAL_GUIDANCE_SCALE = 7.5
_GUIDANCE_SCALES = {
    "StableDiffusionXLPipeline": 5.0,
    "StableDiffusionXLImg2ImgPipeline": 5.0,
    "StableDiffusionUpscalePipeline": 9.0,
    PIXEL_UPSCALE_CLASS: 9.0,
    "LatentConsistencyModelPipeline": 8.5,
}
# A checkpoint's own, in model_index.json; diffusers passes over keys that begin so.
GUIDANCE_KEY = "_guidance_scale"
# Those whose UNet sees nothing but the noisy latents.
_PLAIN = (
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusionImg2ImgPipeline",
    # How diffusers calls the pipeline of a folder with the refiner, too.
    "StableDiffusionXLImg2ImgPipeline",
    "LatentConsistencyModelPipeline",
    PIXEL_CLASS,
)
# Each pipeline here -> the classes of diffusers' pipelines whose checkpoints it reads.
READS: Mapping[str, tuple[str, ...]] = {
    "TextToImagePipeline": _PLAIN,
    "ImageToImagePipeline": _PLAIN,
    "InpaintPipeline": ("StableDiffusionInpaintPipeline", "StableDiffusionXLInpaintPipeline", *_PLAIN),
    "InstructPix2PixPipeline": ("StableDiffusionInstructPix2PixPipeline",),
    "PairedImagePipeline": ("StableDiffusionInstructPix2PixPipeline", PIXEL_PAIRED_CLASS),
    "UpscalePipeline": ("StableDiffusionUpscalePipeline", PIXEL_UPSCALE_CLASS),
}
_SDXL_CLASSES = tuple(name for names in READS.values() for name in names if "XL" in name)
# Those that read old folders of Stable Diffusion as the model was trained; see load_scheduler.
_MENDING = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
)
# Components that the pipelines here read, and those that they do without.
USED = ("unet", "vae", *SCHEDULERS, *TOKENIZERS, *TOKENIZERS.values())
_IGNORED = ("safety_checker", "feature_extractor", "image_encoder", "watermarker")


class Placement(NamedTuple):
    """How stages are loaded: in which dtype, onto which device, which variant of the files, whether to work faster.

    `pack` lets convolutions on a CPU keep a second copy of their weights; see MemoryPolicy. `as_in_file` leaves kernels
    in the layout of the file, mapped from it where the dtype allows: for networks that work seldom.
    """

    dtype: torch.dtype
    device: torch.device
    variant: str | None = None
    pack: bool = False
    as_in_file: bool = False


@contextmanager
def collector_at_rest() -> Iterator[None]:
    """Keep Python's garbage collector from searching for what loading makes, nearly all of which lives on.

    It would go through every object of all imported libraries as well, which takes longer than loading.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def check_class(checkpoint: Checkpoint, classes: Sequence[str]) -> None:
    """Compare what `model_index.json` says the checkpoint is with the classes of diffusers that a pipeline reads.

    Raises:
        ConfigError: another class of pipeline, or components that this one knows nothing of.
    """
    index = f"{quote(checkpoint.path)}, model_index.json"
    found = checkpoint.model_index.get("_class_name")
    if found not in classes:
        reader = next((name for name, names in READS.items() if found in names), None)
        fix = f"load it with {reader}" if reader else f"this pipeline reads {', '.join(classes)}"
        raise ConfigError(f"{index}: _class_name is {quote(found)}; {fix}")
    if unknown := [name for name in checkpoint.components if name not in USED + _IGNORED]:
        raise ConfigError(f"{index}: {quote(unknown[0])} is no component of {found} that is known here")


def forces_zeros(checkpoint: Checkpoint) -> bool:
    """Whether a model was trained with zeros in the place of an empty prompt, as SDXL's are by default."""
    flag = checkpoint.model_index.get("force_zeros_for_empty_prompt", _is_sdxl(checkpoint))
    if not isinstance(flag, bool):
        raise ConfigError(
            f"{quote(checkpoint.path)}: force_zeros_for_empty_prompt in model_index.json is {quote(flag)}; it must be "
            "true or false"
        )
    return flag and _is_sdxl(checkpoint)


def guidance_scale(checkpoint: Checkpoint) -> float:
    """The guidance scale that a checkpoint asks for, or that of its family.

    Raises:
        ConfigError: it asks for what is no guidance scale.
    """
    usual = usual_guidance_scale(str(checkpoint.model_index.get("_class_name")))
    value: Any = checkpoint.model_index.get(GUIDANCE_KEY, usual)
    try:
        return check_guidance_scale(value)
    except InputError as error:
        raise ConfigError(f"{quote(checkpoint.path)}, {GUIDANCE_KEY} in model_index.json: {error}") from None


def usual_guidance_scale(diffusers_class: str) -> float:
    """What a pipeline of diffusers guides with where a call names no scale."""
    return _GUIDANCE_SCALES.get(diffusers_class, USUAL_GUIDANCE_SCALE)


def _is_sdxl(checkpoint: Checkpoint) -> bool:
    return checkpoint.model_index.get("_class_name") in _SDXL_CLASSES


def load_unet(checkpoint: Checkpoint, placement: Placement) -> UNet:
    """The UNet of a checkpoint."""
    with torch.device("meta"):
        unet = UNet(UNetConfig.from_json(checkpoint.config("unet")))
    _load(unet, checkpoint, "unet", placement)
    return unet


def load_decoder(checkpoint: Checkpoint, placement: Placement) -> ImageDecoder:
    """The decoder of a checkpoint's VAE, the encoder's part passed over; that of pixels where there is no VAE."""
    if _works_on_pixels(checkpoint):
        return PixelDecoder()
    with torch.device("meta"):
        decoder = VAEDecoder(VAEConfig.from_json(checkpoint.config("vae")))
    _load(decoder, checkpoint, "vae", placement, prefixes=DECODER_KEYS, ignored_prefixes=ENCODER_KEYS)
    return decoder


def load_encoder(checkpoint: Checkpoint, placement: Placement) -> ImageEncoder:
    """The encoder of a checkpoint's VAE, the decoder's part passed over; that of pixels where there is no VAE."""
    if _works_on_pixels(checkpoint):
        return PixelEncoder()
    with torch.device("meta"):
        encoder = VAEEncoder(VAEConfig.from_json(checkpoint.config("vae")))
    _load(encoder, checkpoint, "vae", placement, prefixes=ENCODER_KEYS, ignored_prefixes=DECODER_KEYS)
    return encoder


def _works_on_pixels(checkpoint: Checkpoint) -> bool:
    name = checkpoint.model_index.get("_class_name")
    if name not in PIXEL_CLASSES:
        return False
    if "vae" in checkpoint.components:
        raise ConfigError(
            f"{quote(checkpoint.path)}, model_index.json: a {name} works on pixels and has no vae; remove the "
            "entry, or correct _class_name"
        )
    return True


def load_text_encoder(checkpoint: Checkpoint, placement: Placement) -> TextEncoder:
    """The text encoder of a checkpoint, or SDXL's pair, with the tokenizers."""
    names = [name for name in TOKENIZERS if name in checkpoint.components]
    if not names:
        there = ", ".join(checkpoint.components)
        raise CheckpointNotFoundError(
            f"{quote(checkpoint.path)} has no text_encoder; its components are: {there}"
        )
    return join_towers([_load_tower(checkpoint, name, placement) for name in names])


def _load_tower(checkpoint: Checkpoint, component: str, placement: Placement) -> CLIPText:
    tower = CLIPText.from_weights(
        CLIPTextConfig.from_json(checkpoint.config(component)),
        checkpoint.tokenizer(TOKENIZERS[component]),
        checkpoint.weights(component, placement.variant),
        layer="penultimate" if _is_sdxl(checkpoint) else "last",
        dtype=placement.dtype,
        device=placement.device,
    )
    tower.model.requires_grad_(False)
    return tower


def load_scheduler(checkpoint: Checkpoint) -> Scheduler:
    """The scheduler of a checkpoint.

    Old folders of Stable Diffusion carry a steps_offset of 0 and clip_sample, which the model was not trained with;
    diffusers' StableDiffusionPipeline reads them as 1 and false, and so they are read here.
    """
    scheduler = Scheduler.from_config(checkpoint.config("scheduler"))
    if checkpoint.model_index.get("_class_name") not in _MENDING or isinstance(
        scheduler.schedule, FlowSchedule
    ):
        return scheduler
    return replace(scheduler, steps_offset=1, clipping=replace(scheduler.clipping, clip_sample=False))


def weight_bytes(checkpoint: Checkpoint, placement: Placement) -> int:
    """A lower bound of the memory that the stages take: the weights of UNet and text encoders."""
    names = ("unet", *(name for name in TOKENIZERS if name in checkpoint.components))
    tensors = (checkpoint.weights(name, placement.variant).tensors() for name in names)
    count = sum(math.prod(info.shape) for infos in tensors for info in infos.values())
    return count * placement.dtype.itemsize


def _load(
    module: nn.Module,
    checkpoint: Checkpoint,
    component: str,
    placement: Placement,
    *,
    prefixes: tuple[str, ...] = ("",),
    ignored_prefixes: tuple[str, ...] = (),
) -> None:
    checkpoint.weights(component, placement.variant).load_into(
        module,
        prefixes=prefixes,
        ignored_prefixes=ignored_prefixes,
        dtype=placement.dtype,
        device=placement.device,
        memory_format=_kernel_layout(placement),
    )
    module.eval().requires_grad_(False)
    if placement.pack and can_pack(placement.dtype):
        pack_convolutions(module)


def _kernel_layout(placement: Placement) -> torch.memory_format:
    """How the kernels of convolutions lie in memory.

    If they do not lie as the images do, kernels rearrange them at every call. Packed ones are not rearranged, and those
    of float16 on a CPU take no longer for it: both stay mapped from the file.
    """
    stays_mapped = placement.pack and (can_pack(placement.dtype) or placement.dtype == torch.float16)
    return torch.preserve_format if stays_mapped or placement.as_in_file else torch.channels_last
