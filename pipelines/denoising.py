"""The way from noise to images that all pipelines take: text to context, denoising step by step, decoding."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import NamedTuple, ParamSpec, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from latentgen.diffusion.guidance import Guidance, guided
from latentgen.diffusion.prediction import Denoiser
from latentgen.diffusion.schedule import NoiseLevel
from latentgen.errors import NumericalError
from latentgen.memory import MemoryPolicy, explained_out_of_memory, resident, weight_bytes
from latentgen.models.text import TextEncoder
from latentgen.models.unet import AddedConditioning, UNet, UNetConstants
from latentgen.models.unet_blocks import repeat_rows
from latentgen.models.vae import VAEDecoder
from latentgen.pipelines.arguments import OutputType
from latentgen.pipelines.autoencoding import decode_images
from latentgen.pipelines.conditioning import (
    SizeConditioning,
    added_conditioning,
    encode_rows,
    time_id_count,
    time_ids,
)
from latentgen.pipelines.output import Images, Output, export
from latentgen.pipelines.request import Request, Sampling
from latentgen.prompt_syntax import PromptSchedule

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


class Beginning(NamedTuple):
    """What the loop begins with.

    Attributes:
        latents: float32 [B, C, h, w], standing at the first noise level.
        channels: what is concatenated to the latents at each step, [B, K, h, w], or where the rows of a guidance differ
            [rows * B, K, h, w].
        class_labels: what the UNet is told besides the timestep, [1].
    """

    latents: Tensor
    channels: Tensor | None = None
    class_labels: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Run:
    """One call, checked.

    Attributes:
        request: the images that are to be made.
        sampling: the steps.
        guidance: what becomes of the outputs for one image.
        shape: of the latents, [B, C, h, w].
        begin: makes what the loop begins with; draws its noise from what each image owns.
        size: height and width in pixels of the images, which are cropped to it.
        output_type: what becomes of the latents.
        progress: whether to show a progress bar.
        size_conditioning: what SDXL is told.
    """

    request: Request
    sampling: Sampling
    guidance: Guidance
    shape: tuple[int, int, int, int]
    begin: Callable[[ImageNoise], Beginning]
    size: tuple[int, int]
    output_type: OutputType
    progress: bool
    size_conditioning: SizeConditioning = field(default_factory=SizeConditioning)


@torch.inference_mode()
def denoise(stages: Stages, run: Run) -> Iterator[PipelineStep]:
    """Make the images of a run: every step, the last of which gives the result.

    Raises:
        NumericalError: NaN or infinity where an image was due; names the step.
        MemoryBudgetError: memory ran out; names the arguments that help.
    """
    count, _, height, width = run.shape
    with explained_out_of_memory(
        f"denoising {count} image(s) of {run.size[1]}x{run.size[0]} pixels",
        partial(denoising_bytes, stages.unet, run.guidance.rows * count, height * width),
        'use fewer images at once, a smaller height and width, MemoryPolicy(attention="chunked", '
        'offload_idle=True, pack_weights=False), guidance_scale=1 or dtype="bfloat16"',
    ):
        yield from _steps(stages, run)


def _steps(stages: Stages, run: Run) -> Iterator[PipelineStep]:
    noise = ImageNoise(run.request.seeds, stages.device)
    begin = run.begin(noise)
    latents = begin.latents.contiguous(memory_format=torch.channels_last)
    scheduler, levels, steps = run.sampling
    told = _encode(stages, run)
    total, check = len(steps), FiniteCheck()
    last: PipelineStep | None = None
    finish = partial(_finish, stages, run, check)
    with (
        resident(stages.unet, stages.device, offload=stages.memory.offload_idle),
        tqdm(total=total, desc="denoising", disable=not run.progress) as bar,
    ):
        position = Position(steps.start)
        denoiser = build_denoiser(stages.unet, run, begin, told, position)
        draw = partial(noise.draw, run.shape[1:])
        for step in scheduler.sample(denoiser, latents, levels, draw, start=steps.start, stop=steps.stop):
            position.step = step.index + 1
            check.watch(step.latents)
            bar.update()
            index = step.index - steps.start
            current = PipelineStep(index, total, step.latents, step.x0, run.request.seeds, finish)
            if current.is_last:
                last = current
            else:
                yield current
    # The UNet has left the device by now, so that decoding has the room.
    if last is not None:
        yield last


class Told(NamedTuple):
    """What the UNet is told during some steps of a run.

    Attributes:
        steps: the steps.
        context: [rows * B, S, D], the least conditioned rows first.
        added: what SDXL's UNet is given besides, for the same rows.
    """

    steps: tuple[range, ...]
    context: Tensor
    added: AddedConditioning | None


@dataclass
class Position:
    """The step that a run is at: where prompts switch, the noise level does not tell on which side a solver asks."""

    step: int


def _encode(stages: Stages, run: Run) -> list[Told]:
    """What the UNet is told: the same at all steps, unless a prompt switches."""
    request, others = run.request, run.guidance.rows - 1
    rows = request.negatives * others, request.prompts
    module = stages.text_encoder.module
    # Whoever brings all of the conditioning along does not wait for the text encoder's weights.
    needed = any(isinstance(row, PromptSchedule) for part in rows for row in part)
    with resident(module, stages.device, offload=stages.memory.offload_idle) if needed else nullcontext():
        stretches = encode_rows(
            stages.text_encoder,
            *rows,
            clip_skip=request.clip_skip,
            steps=run.sampling.steps,
            device=stages.device,
        )
    ids = time_ids(
        run.size_conditioning,
        time_id_count(stages.unet.config, stages.text_encoder.pooled_width),
        run.size,
        negatives=len(request) * others,
        prompts=len(request),
    )
    return [
        Told(steps, conditioning.context, added_conditioning(conditioning.pooled, ids))
        for steps, conditioning in stretches
    ]


@torch.inference_mode()
def _finish(stages: Stages, run: Run, check: FiniteCheck, latents: Tensor) -> Images:
    check.verify(len(run.sampling.steps), _dtype_of(stages.unet))
    if run.output_type == "latent":
        return latents
    images = decode_images(stages.decoder, latents, stages.device, stages.memory)
    return export(images[..., : run.size[0], : run.size[1]], run.output_type)


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
    unet: UNet, run: Run, begin: Beginning, told: Sequence[Told], position: Position
) -> Denoiser:
    """A denoiser for one run, with all that is constant over it computed once.

    Args:
        begin: what is concatenated to the latents, and class labels.
        told: what the UNet is told, at which steps.
        position: the step that is being taken, kept up to date by the caller.
    """
    dtype = _dtype_of(unet)
    constants = [_constants(unet, run, begin, part) for part in told]
    at = {step: index for index, part in enumerate(told) for steps in part.steps for step in steps}
    channels = None if begin.channels is None else begin.channels.to(told[0].context.device, dtype)

    def predict(x: Tensor, level: NoiseLevel) -> tuple[Tensor, ...]:
        sample = x.to(dtype)
        if channels is not None:
            sample = torch.cat([repeat_rows(sample, len(channels)), channels], dim=1)
        current, index_of = constants[at[position.step]]
        output = unet.step(
            sample.contiguous(memory_format=torch.channels_last), current, index_of[level.timestep]
        )
        return output.float().chunk(run.guidance.rows)

    return guided(predict, run.sampling.scheduler.prediction_type, run.guidance)


def _constants(unet: UNet, run: Run, begin: Beginning, told: Told) -> tuple[UNetConstants, dict[float, int]]:
    """What is constant while the UNet is told the same, and which of its time embeddings is that of a timestep."""
    scheduler, levels, _ = run.sampling
    visited = dict.fromkeys(
        level
        for steps in told.steps
        for level in scheduler.visited(levels, start=steps.start, stop=steps.stop)
    )
    timesteps = [level.timestep for level in visited]
    constants = unet.constants(
        told.context.to(_dtype_of(unet)),
        torch.tensor(timesteps, device=told.context.device),
        class_labels=begin.class_labels,
        added=told.added,
        guidance_scale=run.request.guidance_scale if unet.config.time_cond_proj_dim else None,
    )
    return constants, {timestep: index for index, timestep in enumerate(timesteps)}


def _dtype_of(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype
