"""A pipeline call: check its arguments, choose its steps and guidance, draw the noise of each image."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from latentgen.diffusion.schedule import NoiseLevel
from latentgen.diffusion.scheduler import Scheduler
from latentgen.errors import InputError
from latentgen.pipelines.arguments import (
    MAX_CLIP_SKIP,
    MAX_IMAGES_PER_PROMPT,
    AnyScheduler,
    OutputType,
    check_fraction,
    check_guidance_scale,
    check_integer,
    check_options,
    check_output_type,
    check_seeds,
    choose_scheduler,
)
from latentgen.pipelines.conditioning import (
    PromptInput,
    PromptReader,
    Prompts,
    SizeConditioning,
    takes_added_conditioning,
)
from latentgen.pipelines.guidance_options import GuidanceCall, GuidanceOptions
from latentgen.prompt_syntax import PromptSyntax, read_prompt

if TYPE_CHECKING:
    from latentgen.pipelines.base import Pipeline
    from latentgen.pipelines.inpaint import MaskBlend

LatentShape = tuple[int, int, int, int]


@dataclass(frozen=True)
class Request:
    """What to generate, one entry for each output image.

    Attributes:
        prompts: positive prompts.
        negatives: negative prompts.
        clip_skip: how many of the text encoder's last layers to skip for the prompts.
        seeds: seeds of the noise.
        guidance_scale: scale of classifier-free guidance.
    """

    prompts: tuple[PromptInput, ...]
    negatives: tuple[PromptInput, ...]
    clip_skip: int
    seeds: tuple[int, ...]
    guidance_scale: float

    def __len__(self) -> int:
        return len(self.prompts)


class Sampling(NamedTuple):
    """The scheduler and the steps of a run.

    Attributes:
        scheduler: the solver and its noise schedule.
        levels: the noise levels of the whole run, one more than it has steps; the last is where it ends.
        steps: which of the steps between `levels` to take.
    """

    scheduler: Scheduler
    levels: tuple[NoiseLevel, ...]
    steps: range

    @property
    def total(self) -> int:
        """The number of steps of the whole run."""
        return len(self.levels) - 1

    def initial(self, noise: Tensor) -> Tensor:
        """The latents at the first noise level, from standard normal noise of the same shape."""
        return self.scheduler.initial(noise, self.levels)

    @property
    def is_from_noise(self) -> bool:
        """Whether the run starts from pure noise, at the first level."""
        return self.steps.start == 0

    def noised(self, x0: Tensor, noise: Tensor) -> Tensor:
        """Clean latents noised to the level where these steps start; `noise` is standard normal, of their shape."""
        level = self.levels[self.steps.start]
        return level.alpha * x0 + level.sigma * noise

    def with_strength(self, strength: float) -> Sampling:
        """The last steps of the run: the share `strength` of them, rounded down as in diffusers; none at strength 0.

        Raises:
            InputError: not a number from 0 to 1, or above 0 but too small for a single step.
        """
        count = int(self.total * check_fraction("strength", strength))
        if count == 0 and strength > 0:
            raise InputError(
                f"strength={strength} is less than one of the {self.total} steps; use "
                f"{math.ceil(1000 / self.total) / 1000} or more, or more steps"
            )
        return self._replace(steps=range(self.total - count, self.total))


class ImageNoise:
    """Standard normal noise, drawn for each image on its own.

    Image i's noise comes from a CPU generator seeded with seeds[i] alone, so an image depends neither on the rest of
    the batch nor on the device. It equals what diffusers draws from a list of CPU generators.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._device = device

    def draw(self, shape: Sequence[int]) -> Tensor:
        """The next draw of each image, `shape` [C, h, w]: float32 [B, C, h, w] on the device."""
        # A copy from pinned memory does not wait for the device.
        noise = torch.empty((len(self._generators), *shape), pin_memory=self._device.type == "cuda")
        for row, generator in zip(noise, self._generators, strict=True):
            row.normal_(generator=generator)
        return noise.to(self._device, non_blocking=True)


class InitialLatents(NamedTuple):
    """The input of the sampling loop.

    Attributes:
        latents: float32 [B, C, h, w], at the first noise level.
        channels: concatenated to the latents at each step, [B, K, h, w], or [branches * B, K, h, w] if the guidance
            branches differ.
        class_labels: the UNet's class labels, [1].
        mask_blend: the part of an image to blend in at every step.
    """

    latents: Tensor
    channels: Tensor | None = None
    class_labels: Tensor | None = None
    mask_blend: MaskBlend | None = None


@dataclass(frozen=True, eq=False)
class PipelineCall:
    """The checked arguments of a call.

    Attributes:
        request: what to generate.
        sampling: the scheduler and the steps.
        guidance: how to combine the UNet's outputs for one image, and the negative prompts.
        shape: of the latents, [B, C, h, w].
        prepare_latents: makes the input of the loop, with noise from ImageNoise.
        size: height and width in pixels that the decoded images are cropped to.
        output_type: the form of the result.
        progress: whether to show a progress bar.
        size_conditioning: SDXL's sizes, used only by SDXL.
        composite: turns the decoded images [B, 3, H, W] in 0..1 into the result; None leaves them as they are.
        tile: side, in latents, of the overlapping tiles in which larger latents are denoised and decoded; each step
            blends the tiles' outputs (arXiv:2302.08113). None processes all latents at once.
    """

    request: Request
    sampling: Sampling
    guidance: GuidanceCall
    shape: LatentShape
    prepare_latents: Callable[[ImageNoise], InitialLatents]
    size: tuple[int, int]
    output_type: OutputType
    progress: bool
    size_conditioning: SizeConditioning
    composite: Callable[[Tensor], Tensor] | None
    tile: int | None

    @property
    def is_tiled(self) -> bool:
        """Whether the latents are larger than a tile."""
        return self.tile is not None and max(self.shape[2:]) > self.tile


def choose_sampling(
    pipeline: Pipeline,
    scheduler: AnyScheduler | None,
    num_inference_steps: int,
    timesteps: Sequence[float] | None,
    sigmas: Sequence[float] | None,
) -> Sampling:
    """All steps of a run, by the pipeline's own scheduler unless the call names one."""
    is_sdxl = takes_added_conditioning(pipeline.unet.config)
    scheduler = choose_scheduler(scheduler, pipeline.scheduler, is_sdxl=is_sdxl)
    most_steps = scheduler.schedule.num_train_timesteps
    if timesteps is None and sigmas is None:
        levels = scheduler.levels(check_integer("num_inference_steps", num_inference_steps, 1, most_steps))
    else:
        levels = scheduler.levels_at(timesteps=timesteps, sigmas=sigmas)
    return Sampling(scheduler, levels, range(len(levels) - 1))


def read_request(
    pipeline: Pipeline,
    prompt: Prompts,
    negative_prompt: Prompts | None,
    sampling: Sampling,
    *,
    prompt_syntax: PromptSyntax,
    guidance_scale: float | None,
    num_images_per_prompt: int,
    seed: int | Sequence[int] | None,
    clip_skip: int = 0,
    images: int = 1,
) -> Request:
    """The prompts, seeds and guidance scale, one entry for each output image; one prompt serves several `images`."""
    reader = PromptReader(
        prompt_syntax,
        sampling.total,
        pipeline.text_encoder.context_width,
        pipeline.text_encoder.pooled_width if takes_added_conditioning(pipeline.unet.config) else None,
    )
    prompts = reader.prompts(prompt)
    prompts *= images if len(prompts) == 1 else 1
    if images not in (1, len(prompts)):
        raise InputError(f"image has {images} entries for {len(prompts)} prompts; pass one or one for each")
    per_prompt = check_integer("num_images_per_prompt", num_images_per_prompt, 1, MAX_IMAGES_PER_PROMPT)
    if negative_prompt is None and pipeline.force_zeros_for_empty_prompt:
        negatives = (None,) * len(prompts)
    else:
        negatives = reader.negatives("" if negative_prompt is None else negative_prompt, len(prompts))
    return Request(
        prompts=tuple(row for row in prompts for _ in range(per_prompt)),
        negatives=tuple(row for row in negatives for _ in range(per_prompt)),
        clip_skip=check_integer("clip_skip", clip_skip, 0, MAX_CLIP_SKIP),
        seeds=check_seeds(seed, len(prompts) * per_prompt),
        guidance_scale=check_guidance_scale(
            pipeline.default_guidance_scale if guidance_scale is None else guidance_scale
        ),
    )


def choose_guidance(
    pipeline: Pipeline, request: Request, options: GuidanceOptions | None, sampling: Sampling
) -> GuidanceCall:
    """Classifier-free guidance with its options; none for a distilled UNet that takes the scale as an input."""
    options = check_options("guidance", options, GuidanceOptions, "rescale=0.7")
    scale = 1.0 if pipeline.unet.config.time_cond_proj_dim else request.guidance_scale
    guidance = options.guidance(scale, sampling.scheduler)
    empty = None if pipeline.force_zeros_for_empty_prompt else read_prompt("", "plain", sampling.total)
    negatives = {1: (), 2: request.negatives, 3: (empty,) * len(request) + request.negatives}
    return GuidanceCall(guidance, negatives[guidance.num_branches])


def make_call(
    pipeline: Pipeline,
    request: Request,
    sampling: Sampling,
    shape: LatentShape,
    prepare_latents: Callable[[ImageNoise], InitialLatents],
    *,
    guidance: GuidanceOptions | GuidanceCall | None,
    size: tuple[int, int],
    output_type: OutputType,
    progress: bool,
    size_conditioning: SizeConditioning | None = None,
    composite: Callable[[Tensor], Tensor] | None = None,
    tile: int | None = None,
) -> PipelineCall:
    """Check the rest of a call's arguments; they are PipelineCall's attributes."""
    if not isinstance(guidance, GuidanceCall):
        guidance = choose_guidance(pipeline, request, guidance, sampling)
    sizes = check_options(
        "size_conditioning", size_conditioning, SizeConditioning, "original_size=(1024, 1024)"
    )
    return PipelineCall(
        request,
        sampling,
        guidance,
        shape,
        prepare_latents,
        size,
        check_output_type(output_type),
        progress,
        sizes,
        composite,
        tile,
    )
