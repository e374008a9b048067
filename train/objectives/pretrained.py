"""The pretrained models that training starts from or builds on, and whether they fit the recipe and the data."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import fields, replace
from functools import cache, partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from latentgen.checkpoints.folder import EMBEDDED_DEFAULT, CheckpointFolder, resolve
from latentgen.checkpoints.single_file import Checkpoint, SingleFile
from latentgen.diffusion.flow_matching import FlowSchedule
from latentgen.errors import ConfigError, DatasetError
from latentgen.files import quote
from latentgen.memory import MemoryPolicy
from latentgen.models.config import VAEConfig
from latentgen.models.pixels import ImageDecoder, ImageEncoder, PixelConfig, PixelDecoder, PixelEncoder
from latentgen.models.text import CLIPText
from latentgen.models.unet import UNet
from latentgen.models.unet_config import UNetConfig
from latentgen.pipelines.base import Pipeline
from latentgen.pipelines.image_to_image import ImageToImagePipeline
from latentgen.pipelines.inpaint import InpaintPipeline
from latentgen.pipelines.instruct_pix2pix import InstructPix2PixPipeline
from latentgen.pipelines.load_save import LoadOptions, load_decoder, load_encoder, load_text_encoder
from latentgen.pipelines.text_to_image import TextToImagePipeline
from latentgen.train.config import FinetuneTask, TextualInversionMethod
from latentgen.train.data import CaptionedDataset, check_sides

# How mostly idle networks are loaded: in float32 on the CPU, mapped from the file where it holds float32.
IDLE = LoadOptions(torch.float32, torch.device("cpu"), as_in_file=True)
# The class that a checkpoint declares -> the pipeline that runs and saves it.
_PIPELINES: Mapping[object, type[Pipeline]] = {
    "StableDiffusionPipeline": TextToImagePipeline,
    "StableDiffusionXLPipeline": TextToImagePipeline,
    "StableDiffusionImg2ImgPipeline": ImageToImagePipeline,
    "StableDiffusionXLImg2ImgPipeline": ImageToImagePipeline,
    "StableDiffusionInpaintPipeline": InpaintPipeline,
    "StableDiffusionXLInpaintPipeline": InpaintPipeline,
    "StableDiffusionInstructPix2PixPipeline": InstructPix2PixPipeline,
}


def load_model(init_from: Path | None, task: FinetuneTask) -> Pipeline:
    """The model that fine-tuning starts from, in float32 on the CPU; weights that the file holds so are mapped from it.

    Raises:
        ConfigError: it is of a family that cannot be fine-tuned here.
        CheckpointError: it cannot be used; the subclass says why.
    """
    checkpoint = _open(init_from, task)
    name = checkpoint.model_index.get("_class_name")
    if name not in _PIPELINES:
        raise ConfigError(
            f"init_from {quote(checkpoint.path)} is a {quote(name)}; use one of {', '.join(map(str, _PIPELINES))}"
        )
    pipeline = _PIPELINES[name].from_checkpoint(
        checkpoint,
        dtype="float32",
        device="cpu",
        variant=task.variant,
        memory=MemoryPolicy(pack_weights=False),
    )
    idle = IDLE._replace(variant=task.variant)
    pipeline = replace(
        pipeline,
        decoder=load_decoder(checkpoint, idle),
        load_encoder=cache(partial(load_encoder, checkpoint, idle)),
    )
    if pipeline.uses_aesthetic_score:
        raise ConfigError(f"init_from {quote(checkpoint.path)} is SDXL's refiner; fine-tune the base model")
    if pipeline.unet.config.time_cond_proj_dim is not None or isinstance(
        pipeline.scheduler.schedule, FlowSchedule
    ):
        raise ConfigError(
            f"init_from {quote(checkpoint.path)} is distilled or a flow-matching model; fine-tune its base model"
        )
    if task.convert_to is not None:
        pipeline = expand_in_channels(task.convert_to, pipeline)
    scale = task.guidance_scale
    return pipeline if scale is None else replace(pipeline, default_guidance_scale=scale)


def expand_in_channels(kind: Literal["inpainting", "instruct"], pipeline: Pipeline) -> Pipeline:
    """Make a text-to-image model one for inpainting or instructions (arXiv:2211.09800, section 3.2).

    `conv_in` gets input channels with weights of 0, for a mask and an image, or an image alone.
    """
    old, latent = pipeline.unet, pipeline.decoder.config.latent_channels
    target, channels = {
        "inpainting": (InpaintPipeline, 2 * latent + 1),
        "instruct": (InstructPix2PixPipeline, 2 * latent),
    }[kind]
    if old.config.in_channels != latent or (kind == "instruct" and pipeline.is_sdxl):
        raise ConfigError(
            f"task.convert_to is {kind}, which requires a text-to-image model of Stable Diffusion "
            f"{'1 or 2' if kind == 'instruct' else '1, 2 or XL'} as init_from; it is a {pipeline.diffusers_class} "
            f"whose UNet has {old.config.in_channels} input channels"
        )
    state = widened_state(old.state_dict(), channels)
    wide = UNet(old.config.model_copy(update={"in_channels": channels}))
    wide.load_state_dict(state)
    stages = {item.name: getattr(pipeline, item.name) for item in fields(pipeline)}
    return target(**{**stages, "unet": wide.eval().requires_grad_(False)})


def widened_state(state: dict[str, Tensor], in_channels: int) -> dict[str, Tensor]:
    """The weights of a UNet whose `conv_in` gets more input channels: the new ones have no effect at first."""
    known = state["conv_in.weight"]  # [out, in, 3, 3]
    zeros = known.new_zeros(len(known), in_channels - known.shape[1], 3, 3)
    return {**state, "conv_in.weight": torch.cat([known, zeros], dim=1)}


def _open(init_from: Path | None, task: FinetuneTask) -> Checkpoint:
    if init_from is None:
        return CheckpointFolder.open(EMBEDDED_DEFAULT)
    if init_from.is_file():
        return SingleFile.open(init_from, prediction_type=task.prediction_type)
    if task.prediction_type is not None:
        raise ConfigError(
            f"task.prediction_type is for single files; {quote(init_from)} has it in its scheduler's configuration"
        )
    return CheckpointFolder.open(resolve(str(init_from), variant=task.variant))


def check_data(task: FinetuneTask, data: CaptionedDataset, pipeline: Pipeline) -> None:
    """Refuse a training set that this model cannot be trained on.

    Raises:
        ConfigError: the autoencoder cannot divide the size of its images.
        DatasetError: captions lack the token that is to be learned, or images lack the image before the edit.
    """
    factor = pipeline.decoder.spatial_factor
    check_sides(data, factor)
    shows_before = pipeline.unet.config.in_channels == 2 * pipeline.decoder.config.latent_channels
    if shows_before and data.sample(0, random.Random(0)).before is None:
        raise DatasetError("the model edits images: add an image `before` to those of the training set")
    method = task.method
    if isinstance(method, TextualInversionMethod):
        without = sum(method.token not in caption for caption in data.captions())
        if without:
            raise DatasetError(
                f"{without} captions lack the new token; write it into each: {quote(f'a photo of {method.token}')}"
            )


def own_memory(module: nn.Module) -> None:
    """Copy trained parameters out of their mapped file, where unaligned tensors make kernels round differently."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.clone()


def load_vae(path: Path | None) -> tuple[ImageEncoder, ImageDecoder]:
    """A pretrained autoencoder, or the identity of pixel space for None, in float32 on the CPU."""
    if path is None:
        return PixelEncoder(), PixelDecoder()
    folder = CheckpointFolder.open(path)
    return load_encoder(folder, IDLE), load_decoder(folder, IDLE)


def load_frozen_text_encoder(folder: Path) -> CLIPText:
    """A text encoder whose weights are not trained, in float32 on the CPU.

    Raises:
        ConfigError: it is SDXL's pair, which the models of these tasks are not conditioned on.
    """
    text = load_text_encoder(CheckpointFolder.open(folder), IDLE)
    if not isinstance(text, CLIPText):
        raise ConfigError("task.text_encoder has two text encoders; name the folder of a model with one")
    return text


def check_fit(
    unet: UNetConfig,
    vae: VAEConfig | PixelConfig,
    *,
    context_width: int,
    data: CaptionedDataset,
    in_channels: Mapping[int, str],
) -> None:
    """Refuse configurations that do not fit each other with a ConfigError that lists all mismatches.

    `context_width` is the channels of the text encoder's output, `in_channels` how many input channels the UNet can
    have, and for what.
    """
    problems = []
    if unet.in_channels not in in_channels:
        allowed = ", ".join(f"{channels} for {what}" for channels, what in in_channels.items())
        problems.append(f"task.unet.in_channels is {unet.in_channels}; with task.vae it can be {allowed}")
    if unet.out_channels != vae.latent_channels:
        problems.append(
            f"task.unet.out_channels is {unet.out_channels}, but latents have {vae.latent_channels}"
        )
    if unet.cross_attention_dim != context_width:
        problems.append(
            f"task.unet.cross_attention_dim is {unet.cross_attention_dim}; it must be {context_width}, the "
            "hidden_size of task.text_encoder"
        )
    if problems:
        raise ConfigError("the parts of the recipe do not fit each other: " + "; ".join(problems))
    check_sides(data, vae.spatial_factor)
