"""The way from noise to images that all pipelines take: text to context, denoising step by step, decoding."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from typing import ParamSpec, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from latentgen.diffusion.guidance import classifier_free, is_guided
from latentgen.diffusion.prediction import Denoiser
from latentgen.diffusion.schedule import NoiseLevel
from latentgen.diffusion.scheduler import Scheduler
from latentgen.errors import InputError, NumericalError
from latentgen.memory import MemoryPolicy, explained_out_of_memory, resident, weight_bytes
from latentgen.models.text import Conditioning, TextEncoder
from latentgen.models.unet import AddedConditioning, UNet
from latentgen.models.vae import VAEDecoder
from latentgen.pipelines.arguments import OutputType, check_share
from latentgen.pipelines.base import Images, Output, decode_images, export
from latentgen.pipelines.conditioning import added_conditioning, encode_rows

P = ParamSpec("P")


class Stages(Protocol):
    """The stages of a pipeline, and where they run."""

    @property
    def unet(self) -> UNet: ...

    @property
    def decoder(self) -> VAEDecoder: ...

    @property
    def text_encoder(self) -> TextEncoder: ...

    @property
    def memory(self) -> MemoryPolicy: ...

    @property
    def device(self) -> torch.device: ...


@dataclass(frozen=True, eq=False)
class Run:
    """The checked arguments of one call.

    prompts and negatives have one entry for each image; without guidance there are no negatives. steps is the part of
    the steps over `levels` that is taken.
    """

    prompts: tuple[str, ...]
    negatives: tuple[str | None, ...]
    clip_skip: int
    time_ids: Tensor | None
    seeds: tuple[int, ...]
    latents: Tensor | None
    shape: tuple[int, int, int, int]
    scheduler: Scheduler
    levels: tuple[NoiseLevel, ...]
    steps: range
    guidance_scale: float
    output_type: OutputType
    progress: bool


def part_of_run(
    scheduler: Scheduler,
    levels: Sequence[NoiseLevel],
    denoising_start: float,
    denoising_end: float,
    latents: Tensor | None,
) -> range:
    """The steps of a run over `levels` that lie between two shares of the schedule."""
    start = scheduler.steps_before(levels, check_share("denoising_start", denoising_start))
    stop = scheduler.steps_before(levels, check_share("denoising_end", denoising_end))
    if start >= stop:
        raise InputError(
            f"between denoising_start={denoising_start} and denoising_end={denoising_end} lies none of the "
            f"{len(levels) - 1} steps; use more steps or a wider part"
        )
    if start > 0 and latents is None:
        raise InputError(
            f"denoising_start={denoising_start} needs the latents that it starts from: the output of a pipeline "
            'with the same denoising_end and output_type="latent"'
        )
    return range(start, stop)


@torch.inference_mode()
def denoise(stages: Stages, run: Run) -> Iterator[PipelineStep]:
    """Make the images of a run: every step, the last of which gives the result.

    Raises:
        NumericalError: NaN or infinity where an image was due; names the step.
        MemoryBudgetError: memory ran out; names the arguments that help.
    """
    count, _, height, width = run.shape
    factor = stages.decoder.config.spatial_factor
    with explained_out_of_memory(
        f"denoising {count} image(s) of {width * factor}x{height * factor} pixels",
        partial(denoising_bytes, stages.unet, len(run.negatives) + count, height * width),
        'use fewer images at once, a smaller height and width, MemoryPolicy(attention="chunked", '
        'offload_idle=True, pack_weights=False), guidance_scale=1 or dtype="bfloat16"',
    ):
        yield from _steps(stages, run)


def _steps(stages: Stages, run: Run) -> Iterator[PipelineStep]:
    noise = ImageNoise(run.seeds, run.shape[1:], stages.device)
    latents = noise() if run.latents is None else run.latents.to(stages.device)
    if run.steps.start == 0:
        latents = run.scheduler.initial(latents, run.levels)
    latents = latents.contiguous(memory_format=torch.channels_last)
    conditioning = _encode(stages, run)
    start, stop, total = run.steps.start, run.steps.stop, len(run.steps)
    check = FiniteCheck()
    last: PipelineStep | None = None
    finish = partial(_finish, stages, run.output_type, check, total)
    with (
        resident(stages.unet, stages.device, offload=stages.memory.offload_idle),
        tqdm(total=total, desc="denoising", disable=not run.progress) as bar,
    ):
        denoiser = build_denoiser(
            stages.unet,
            conditioning.context,
            added_conditioning(conditioning.pooled, run.time_ids),
            run.levels[start : stop + 1],
            run.scheduler,
            run.guidance_scale,
        )
        for step in run.scheduler.sample(denoiser, latents, run.levels, noise, start=start, stop=stop):
            check.watch(step.latents)
            bar.update()
            current = PipelineStep(step.index - start, total, step.latents, step.x0, run.seeds, finish)
            if current.is_last:
                last = current
            else:
                yield current
    # The UNet has left the device by now, so that decoding has the room.
    if last is not None:
        yield last


def _encode(stages: Stages, run: Run) -> Conditioning:
    with resident(stages.text_encoder.module, stages.device, offload=stages.memory.offload_idle):
        return encode_rows(stages.text_encoder, run.negatives, run.prompts, clip_skip=run.clip_skip)


@torch.inference_mode()
def _finish(
    stages: Stages, output_type: OutputType, check: FiniteCheck, total: int, latents: Tensor
) -> Images:
    check.verify(total, _dtype_of(stages.unet))
    if output_type == "latent":
        return latents
    return export(decode_images(stages.decoder, latents, stages.device, stages.memory), output_type)


@dataclass(frozen=True, eq=False)
class PipelineStep:
    """One step of a run that is under way.

    Attributes:
        index: number of the step, from 0.
        total: how many steps the run has.
        latents: float32 [B, C, h, w], the latents after this step.
        x0: float32 [B, C, h, w], where the denoiser expects the run to end.
        seeds: the seed of each image.
    """

    index: int
    total: int
    latents: Tensor
    x0: Tensor
    seeds: tuple[int, ...]
    _finish: Callable[[Tensor], Images]

    @property
    def is_last(self) -> bool:
        """Whether `images` gives the result rather than a preview."""
        return self.index == self.total - 1

    def images(self) -> Images:
        """The result at the last step, a preview of it before, as the call's `output_type` has it.

        Raises:
            NumericalError: the latents or the images hold NaN or infinity; names the step.
        """
        return self._finish(self.latents if self.is_last else self.x0)


def completed(stream: Callable[P, Iterator[PipelineStep]]) -> Callable[P, Output]:
    """What runs a stream to its end and gives its result: the call of a pipeline, with the arguments of its stream."""

    @wraps(stream)
    def call(*args: P.args, **kwargs: P.kwargs) -> Output:
        (last,) = deque(stream(*args, **kwargs), maxlen=1)
        return Output(last.images(), last.seeds)

    return call


class ImageNoise:
    """Standard normal noise of which every image owns its part.

    Row i comes from a CPU generator seeded with seeds[i] alone, so an image depends neither on its neighbours
    nor on the device. It is what diffusers draws from a list of CPU generators.
    """

    def __init__(self, seeds: Sequence[int], shape: Sequence[int], device: torch.device) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._shape = (len(seeds), *shape)
        self._device = device

    def __call__(self) -> Tensor:
        """The next draw: float32 [B, C, h, w] on the device."""
        # A copy from pinned memory does not wait for the device.
        noise = torch.empty(self._shape, pin_memory=self._device.type == "cuda")
        for row, generator in zip(noise, self._generators, strict=True):
            row.normal_(generator=generator)
        return noise.to(self._device, non_blocking=True)


class FiniteCheck:
    """Finds the step at which latents stopped being finite, without a synchronisation while they are made."""

    def __init__(self) -> None:
        self._sums: list[Tensor] = []

    def watch(self, latents: Tensor) -> None:
        """Note the latents of the next step; one reduction on the device."""
        self._sums.append(latents.sum())

    def verify(self, total: int, dtype: torch.dtype) -> None:
        """Wait for the steps watched so far.

        Raises:
            NumericalError: naming the first step, of `total`, that gave NaN or infinity.
        """
        finite = torch.stack(self._sums).isfinite().tolist()
        if not all(finite):
            step = finite.index(False) + 1
            advice = (
                "check the weights and guidance_scale"
                if dtype == torch.float32
                else 'try dtype="bfloat16" or dtype="float32"'
            )
            raise NumericalError(f"the latents hold NaN or infinity from step {step} of {total} on; {advice}")


def denoising_bytes(unet: UNet, rows: int, pixels: int) -> int:
    """A lower bound of the memory of a step: the weights, and four feature maps at the highest resolution.

    Args:
        rows: what the UNet sees at once, two of each image with guidance.
        pixels: latent pixels of one image.
    """
    maps = 4 * rows * pixels * unet.config.block_out_channels[0]
    return weight_bytes(unet) + maps * unet.conv_in.weight.element_size()


def build_denoiser(
    unet: UNet,
    context: Tensor,
    added: AddedConditioning | None,
    levels: Sequence[NoiseLevel],
    scheduler: Scheduler,
    guidance_scale: float,
) -> Denoiser:
    """A denoiser for one run over `levels`, with all that is constant over the run computed once.

    Args:
        context: [B, S, D], or with guidance [2B, S, D]: of the negative prompts, then of the prompts.
        added: what SDXL's UNet is given besides, for the same rows.
    """
    dtype = unet.conv_in.weight.dtype
    index_of = {level.timestep: index for index, level in enumerate(levels[:-1])}
    timesteps = torch.tensor([level.timestep for level in levels[:-1]], device=context.device)
    constants = unet.constants(context.to(dtype), timesteps, added=added)
    guided = is_guided(guidance_scale)

    def predict(x: Tensor, level: NoiseLevel) -> tuple[Tensor | None, Tensor]:
        output = unet.step(x.to(dtype), constants, index_of[level.timestep]).float()
        if not guided:
            return None, output
        unconditional, conditional = output.chunk(2)
        return unconditional, conditional

    return classifier_free(predict, scheduler.prediction_type, guidance_scale)


def _dtype_of(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype
