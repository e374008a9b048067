"""What fine-tuning starts from: a finished model of any family, and whether a training set can teach it."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from latentgen.checkpoints.folder import EMBEDDED_DEFAULT, Checkpoint, CheckpointFolder, resolve
from latentgen.checkpoints.single_file import SingleFile
from latentgen.diffusion.flow_matching import FlowSchedule
from latentgen.errors import ConfigError, DatasetError
from latentgen.files import quote
from latentgen.memory import MemoryPolicy
from latentgen.models.unet import UNet
from latentgen.pipelines.base import Pipeline
from latentgen.pipelines.image_to_image import ImageToImagePipeline
from latentgen.pipelines.inpaint import InpaintPipeline
from latentgen.pipelines.instruct_pix2pix import InstructPix2PixPipeline
from latentgen.pipelines.load_save import load_decoder, load_encoder
from latentgen.pipelines.text_to_image import TextToImagePipeline
from latentgen.train.config import FinetuneTask, LoRAMethod, TextualInversionMethod
from latentgen.train.data import CaptionedDataset, check_sides
from latentgen.train.objectives.lent import IDLE

# The class that a checkpoint says that it is -> the pipeline that draws with it and saves it.
_PIPELINES: Mapping[object, type[Pipeline]] = {
    "StableDiffusionPipeline": TextToImagePipeline,
    "StableDiffusionXLPipeline": TextToImagePipeline,
    "StableDiffusionImg2ImgPipeline": ImageToImagePipeline,
    "StableDiffusionXLImg2ImgPipeline": ImageToImagePipeline,
    "StableDiffusionInpaintPipeline": InpaintPipeline,
    "StableDiffusionXLInpaintPipeline": InpaintPipeline,
    "StableDiffusionInstructPix2PixPipeline": InstructPix2PixPipeline,
}


@dataclass(frozen=True)
class Origin:
    """What a run starts from, and what of it lies where.

    Attributes:
        source: a folder in the diffusers layout, a single file, or None for the embedded default model.
        class_images: the folder where the class images of prior preservation are kept.
    """

    source: Path | None
    class_images: Path

    def named(self, task: FinetuneTask) -> str:
        """What tells the model that a run starts from, a LoRA to go on from included, from others."""
        lora = task.method.init_lora if isinstance(task.method, LoRAMethod) else None
        return f"{self.source}, {lora}"


def load_origin(source: Path | None, task: FinetuneTask) -> Pipeline:
    """The model that a run starts from, in float32 on the CPU; weights that the file holds so are mapped from it.

    Raises:
        ConfigError: it is of a family that is not fine-tuned here.
        CheckpointError: it cannot be used; the subclass says why.
    """
    checkpoint = _open(source, task)
    name = checkpoint.model_index.get("_class_name")
    if name not in _PIPELINES:
        raise ConfigError(
            f"init_from {quote(checkpoint.path)} is a {quote(name)}, which kind finetune does not train; it takes "
            f"models whose class is {', '.join(map(str, _PIPELINES))}. Models on pixels go on with kind text_to_image, "
            "upscalers with kind upscale"
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
        raise ConfigError(
            f"init_from {quote(checkpoint.path)} is SDXL's refiner, which is told an aesthetic score that no "
            "training set here states; fine-tune the base model"
        )
    if pipeline.unet.config.time_cond_proj_dim is not None or isinstance(
        pipeline.scheduler.schedule, FlowSchedule
    ):
        raise ConfigError(
            f"init_from {quote(checkpoint.path)} was distilled, or learnt by flow matching, which the objectives "
            "here are not for; fine-tune the model that it was made from"
        )
    if task.convert_to is not None:
        pipeline = _turned_into(task.convert_to, pipeline)
    scale = task.guidance_scale
    return pipeline if scale is None else replace(pipeline, default_guidance_scale=scale)


def _turned_into(kind: Literal["inpainting", "instruct"], pipeline: Pipeline) -> Pipeline:
    """A model of text to image whose UNet takes a mask and an image besides, or an image alone, with weights of 0."""
    old, latent = pipeline.unet, pipeline.decoder.config.latent_channels
    target, channels = {
        "inpainting": (InpaintPipeline, 2 * latent + 1),
        "instruct": (InstructPix2PixPipeline, 2 * latent),
    }[kind]
    if old.config.in_channels != latent or (kind == "instruct" and pipeline.is_sdxl):
        raise ConfigError(
            f"task.convert_to is {kind}, for which init_from must be a model of text to image of Stable Diffusion "
            f"{'1 or 2' if kind == 'instruct' else '1, 2 or XL'}; it is a {pipeline.diffusers_class} whose UNet has "
            f"{old.config.in_channels} input channels"
        )
    wide = UNet(old.config.model_copy(update={"in_channels": channels}))
    state = old.state_dict()
    known = state["conv_in.weight"]
    state["conv_in.weight"] = torch.cat([known, known.new_zeros(len(known), channels - latent, 3, 3)], dim=1)
    wide.load_state_dict(state)
    stages = {item.name: getattr(pipeline, item.name) for item in fields(pipeline)}
    return target(**{**stages, "unet": wide.eval().requires_grad_(False)})


def _open(source: Path | None, task: FinetuneTask) -> Checkpoint:
    if source is None:
        return CheckpointFolder.open(EMBEDDED_DEFAULT)
    if source.is_file():
        return SingleFile.open(source, prediction_type=task.prediction_type)
    if task.prediction_type is not None:
        raise ConfigError(
            f"task.prediction_type is for single files; {quote(source)} states its own in its scheduler's configuration"
        )
    return CheckpointFolder.open(resolve(str(source), variant=task.variant))


def check_data(task: FinetuneTask, data: CaptionedDataset, pipeline: Pipeline) -> None:
    """Refuse a training set that cannot teach this model.

    Raises:
        ConfigError: the size of its images is none that the model can have.
        DatasetError: its captions do not have the token that is to be learnt, or it lacks the images before an edit.
    """
    factor = pipeline.decoder.config.spatial_factor
    check_sides(data, factor)
    shows_before = pipeline.unet.config.in_channels == 2 * pipeline.decoder.config.latent_channels
    if shows_before and data.sample(0, random.Random(0)).before is None:
        raise DatasetError(
            "the model edits images, and the training set does not say what they looked like before; give each an "
            "image `before`"
        )
    method = task.method
    if isinstance(method, TextualInversionMethod):
        without = sum(method.token not in caption for caption in data.captions())
        if without:
            raise DatasetError(
                f"{without} captions do not have the token {quote(method.token)} that is to be learnt; write it into "
                f"each, as in {quote(f'a photo of {method.token}')}"
            )


def own_memory(module: nn.Module) -> None:
    """Give what learns memory of its own; in a file, tensors begin at any byte, and kernels round otherwise there."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.clone()
