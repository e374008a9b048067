"""A pipeline call: check its arguments, choose its steps and guidance, draw the noise of each image."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeAlias, TypedDict

import torch
from torch import Tensor

from latentgen.diffusion.guidance import ClassifierFree, Guidance
from latentgen.diffusion.schedule import NoiseLevel
from latentgen.diffusion.scheduler import Scheduler
from latentgen.errors import InputError
from latentgen.pipelines.arguments import (
    MAX_CLIP_SKIP,
    MAX_IMAGES_PER_PROMPT,
    OutputType,
    check_fraction,
    check_guidance_scale,
    check_integer,
    check_options,
    check_output_type,
    check_seeds,
    match_count,
)
from latentgen.pipelines.conditioning import PromptInput, Prompts, read_prompts
from latentgen.pipelines.guidance_options import GuidanceOptions
from latentgen.pipelines.size_conditioning import SizeConditioning
from latentgen.prompts import DEFAULT_SYNTAX, PromptSyntax

if TYPE_CHECKING:
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

    from latentgen.pipelines.base import Pipeline
    from latentgen.pipelines.inpaint import MaskBlend

DEFAULT_STEPS = 25
LatentShape = tuple[int, int, int, int]
# The scheduler of a call: the name of a solver, a Scheduler, or a diffusers scheduler.
AnyScheduler: TypeAlias = "str | Scheduler | SchedulerMixin"


class UnguidedOptions(TypedDict, total=False):
    """The arguments that all pipelines take; see CallOptions."""

    negative_prompt: Prompts | None
    prompt_syntax: PromptSyntax
    num_inference_steps: int
    timesteps: Sequence[float] | None
    sigmas: Sequence[float] | None
    guidance_scale: float | None
    num_images_per_prompt: int
    seed: int | Sequence[int] | None
    scheduler: AnyScheduler | None
    clip_skip: int
    size_conditioning: SizeConditioning | None
    output_type: OutputType
    progress: bool


class CallOptions(UnguidedOptions, total=False):
    """The arguments that pipelines share; `read_request` has their defaults.

    Attributes:
        negative_prompt: one for all prompts or one for each, or embeddings; None is the empty prompt.
        prompt_syntax: "explicit" reads `(text:1.2)` as a weight, and `\\(` as a parenthesis; the rest is text.
            "a1111" also reads `(text)` as 1.1, `[text]` as 1 / 1.1, `BREAK`, `[from:to:when]`, `[to:when]`,
            `[from::when]` and `[one|other]`; `when` is a number of steps, or with a decimal point a fraction of
            them. In "plain" every character is text.
        num_inference_steps: steps of the solver, over the whole schedule.
        timesteps: decreasing, one for each step; replaces `num_inference_steps` and the scheduler's spacing.
        sigmas: decreasing noise levels sigma / alpha, one for each step and one for the end of the run, usually 0;
            replaces `num_inference_steps`. Flow-matching models take sigma before the shift; the end may be omitted.
        guidance_scale: scale of classifier-free guidance (arXiv:2207.12598, eq. 6, as 1 + w); 1 or less
            turns guidance off and halves the time. By default the checkpoint's own (the embedded model has one), else
            7.5, or 5 for SDXL, as in diffusers.
        guidance: further options: rescaling, an interval, a perpendicular negative prompt, CFG++.
        num_images_per_prompt: images per prompt.
        seed: image i of the call gets seed + i; or one seed for each image; None draws one at random.
        scheduler: the name of a solver, a Scheduler or a diffusers scheduler; by default the checkpoint's.
        clip_skip: how many of the text encoder's last layers to skip for the prompts.
        size_conditioning: SDXL's size and crop conditioning; other models ignore it.
        output_type: "pil", "np", "pt" or "latent"; see Output.
        progress: show a progress bar.
    """

    guidance: GuidanceOptions | None


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
        """The last steps of the run: the fraction `strength`, rounded down as in diffusers; none at strength 0.

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


@dataclass(frozen=True, eq=False)
class Request:
    """The checked arguments that pipelines share; prompts and seeds have one entry for each output image.

    Attributes:
        prompts: positive prompts.
        negatives: the prompts of all guidance branches but the last, which has the positive ones; branch by branch.
        sampling: the scheduler and all steps of the run.
        guidance: combines the UNet's outputs for one image.
        guidance_scale: an input of distilled UNets, which need no `guidance`.
        clip_skip: how many of the text encoder's last layers to skip for the positive prompts.
        seeds: seeds of the noise.
        size_conditioning: SDXL's sizes; None for the defaults.
        output_type: the form of the result.
        progress: whether to show a progress bar.
    """

    prompts: tuple[PromptInput, ...]
    negatives: tuple[PromptInput, ...]
    sampling: Sampling
    guidance: Guidance
    guidance_scale: float
    clip_skip: int
    seeds: tuple[int, ...]
    size_conditioning: SizeConditioning | None
    output_type: OutputType
    progress: bool

    def __len__(self) -> int:
        return len(self.prompts)


class ImageNoise:
    """Standard normal noise, drawn for each image on its own.

    Image i's noise comes from a CPU generator seeded with only seeds[i], so an image depends neither on the rest of
    the batch nor on the device. It equals what diffusers draws from a list of CPU generators.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._device = device

    def draw(self, shape: Sequence[int]) -> Tensor:
        """Draw the next noise of each image, of `shape` [C, h, w], as float32 [B, C, h, w] on the device."""
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
    """A call that is ready to run.

    Attributes:
        request: what to generate.
        sampling: the scheduler and the steps to take.
        shape: of the latents, [B, C, h, w].
        prepare_latents: makes the input of the loop, with noise from ImageNoise.
        size: height and width in pixels that the decoded images are cropped to.
        composite: turns the decoded images [B, 3, H, W] in 0..1 into the result; None leaves them as they are.
        tile: side, in latents, of the overlapping tiles in which larger latents are denoised and decoded; each step
            blends the tiles' outputs (arXiv:2302.08113). None processes all latents at once.
    """

    request: Request
    sampling: Sampling
    shape: LatentShape
    prepare_latents: Callable[[ImageNoise], InitialLatents]
    size: tuple[int, int]
    composite: Callable[[Tensor], Tensor] | None = None
    tile: int | None = None

    @property
    def is_tiled(self) -> bool:
        """Whether the latents are larger than a tile."""
        return self.tile is not None and max(self.shape[2:]) > self.tile


def read_request(
    pipeline: Pipeline,
    prompt: Prompts,
    *,
    images: int = 1,
    negative_prompt: Prompts | None = None,
    prompt_syntax: PromptSyntax = DEFAULT_SYNTAX,
    num_inference_steps: int = DEFAULT_STEPS,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
    guidance_scale: float | None = None,
    guidance: GuidanceOptions | None = None,
    num_images_per_prompt: int = 1,
    seed: int | Sequence[int] | None = None,
    scheduler: AnyScheduler | None = None,
    clip_skip: int = 0,
    size_conditioning: SizeConditioning | None = None,
    output_type: OutputType = "pil",
    progress: bool = True,
) -> Request:
    """Check the arguments of CallOptions. A single prompt is used for all input `images`."""
    sampling = choose_sampling(pipeline, scheduler, num_inference_steps, timesteps, sigmas)
    read = partial(read_prompts, pipeline, prompt_syntax, sampling.total)
    prompts = read("prompt", prompt)
    prompts *= images if len(prompts) == 1 else 1
    if images not in (1, len(prompts)):
        raise InputError(f"image has {images} entries for {len(prompts)} prompts; pass one or one for each")
    no_prompt = (None,) if pipeline.force_zeros_for_empty_prompt else read("negative_prompt", "")
    negatives = no_prompt if negative_prompt is None else read("negative_prompt", negative_prompt)
    negatives = match_count("negative_prompt", negatives, len(prompts))
    per_prompt = check_integer("num_images_per_prompt", num_images_per_prompt, 1, MAX_IMAGES_PER_PROMPT)
    prompts = tuple(row for row in prompts for _ in range(per_prompt))
    negatives = tuple(row for row in negatives for _ in range(per_prompt))

    scale = check_guidance_scale(
        pipeline.default_guidance_scale if guidance_scale is None else guidance_scale
    )
    # A distilled UNet takes the scale as an input instead.
    outer_scale = 1.0 if pipeline.unet.config.time_cond_proj_dim else scale
    combine: Guidance = ClassifierFree(outer_scale)
    if options := check_options("guidance", guidance, GuidanceOptions, "; the scale is guidance_scale"):
        combine = options.guidance(outer_scale, sampling.scheduler)
    branches = {1: (), 2: negatives, 3: no_prompt * len(prompts) + negatives}
    return Request(
        prompts,
        branches[combine.num_branches],
        sampling,
        combine,
        scale,
        check_integer("clip_skip", clip_skip, 0, MAX_CLIP_SKIP),
        check_seeds(seed, len(prompts)),
        check_options("size_conditioning", size_conditioning, SizeConditioning),
        check_output_type(output_type),
        progress,
    )


def choose_sampling(
    pipeline: Pipeline,
    scheduler: AnyScheduler | None,
    num_inference_steps: int,
    timesteps: Sequence[float] | None,
    sigmas: Sequence[float] | None,
) -> Sampling:
    """All steps of a run, by the pipeline's own scheduler unless the call names one."""
    chosen = choose_scheduler(scheduler, pipeline)
    if timesteps is None and sigmas is None:
        most_steps = chosen.schedule.num_train_timesteps
        levels = chosen.levels(check_integer("num_inference_steps", num_inference_steps, 1, most_steps))
    else:
        levels = chosen.levels_at(timesteps=timesteps, sigmas=sigmas)
    return Sampling(chosen, levels, range(len(levels) - 1))


def choose_scheduler(choice: AnyScheduler | None, pipeline: Pipeline) -> Scheduler:
    """The scheduler of a call; a name replaces only the solver of the pipeline's own scheduler.

    Raises:
        InputError: an unknown solver, or not a scheduler.
        ConfigError: a diffusers scheduler that is not supported.
    """
    if choice is None:
        return pipeline.scheduler
    if isinstance(choice, str):
        chosen = pipeline.scheduler.with_solver(choice)
        aligned_to_sd = chosen.sigmas == "align_your_steps" and pipeline.is_sdxl
        return replace(chosen, sigmas="align_your_steps_xl") if aligned_to_sd else chosen
    if isinstance(choice, Scheduler):
        return choice
    config = getattr(choice, "config", None)  # a diffusers scheduler, without importing diffusers
    if not isinstance(config, Mapping):
        raise InputError(
            f"scheduler must be a name, a Scheduler or a diffusers scheduler, not {type(choice).__name__}"
        )
    return Scheduler.from_config({**config, "_class_name": type(choice).__name__})
