"""From noise to images: encode the prompts, denoise step by step, decode. Every pipeline uses this loop."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial, wraps
from typing import TYPE_CHECKING, NamedTuple, ParamSpec

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from latentgen.diffusion.guidance import guided
from latentgen.diffusion.prediction import Denoiser
from latentgen.diffusion.schedule import CLEAN, NoiseLevel
from latentgen.errors import NumericalError
from latentgen.memory import on_device, oom_hint, weight_bytes
from latentgen.models.unet import UNet, UNetConstants
from latentgen.models.unet_blocks import repeat_rows
from latentgen.models.vae import VAEDecoder
from latentgen.pipelines.arguments import OutputType
from latentgen.pipelines.call import ImageNoise, InitialLatents, PipelineCall
from latentgen.pipelines.conditioning import PromptSegment, encode_prompts
from latentgen.pipelines.tiles import in_tiles
from latentgen.pipelines.vae_ops import decode_images, dtype_of, to_numpy, to_pil, to_unit

if TYPE_CHECKING:
    from latentgen.pipelines.base import Pipeline

P = ParamSpec("P")


@torch.inference_mode()
def denoise(pipeline: Pipeline, call: PipelineCall) -> Iterator[PipelineStep]:
    """Yield every step of a call, at least one; the last one holds the result.

    Raises:
        NumericalError: the latents or the images have NaN or infinity; names the step.
        MemoryBudgetError: memory ran out; names the arguments that help.
    """
    with oom_hint(
        f"denoising {len(call.request)} image(s) of {call.size[1]}x{call.size[0]} pixels",
        partial(_denoising_bytes, pipeline, call),
        'use fewer images at once, a smaller height and width, MemoryPolicy(attention="chunked", '
        'sequential_guidance=True, offload_idle=True, pack_weights=False), guidance_scale=1 or dtype="bfloat16"',
    ):
        yield from _steps(pipeline, call)


def _steps(pipeline: Pipeline, call: PipelineCall) -> Iterator[PipelineStep]:
    # Draw the noise and prepare the latents [B, C, h, w] at the first noise level.
    noise = ImageNoise(call.request.seeds, pipeline.device)
    initial = call.prepare_latents(noise)
    latents = initial.latents.contiguous(memory_format=torch.channels_last)
    scheduler, levels, steps = call.sampling
    total = len(steps)
    sums: list[Tensor] = []  # of the latents after each step, to find NaN without waiting for the device
    finish = partial(_finish, pipeline, call, sums)
    if not steps:
        yield PipelineStep(-1, total, latents, latents, call.request.seeds, finish)
        return

    # Encode the prompts; the text encoder is then offloaded if the memory policy says so.
    segments, counter = encode_prompts(pipeline, call), StepCounter(steps.start)

    last: PipelineStep | None = None
    with (
        on_device(pipeline.unet, pipeline.device, offload=pipeline.memory.offload_idle),
        tqdm(total=total, desc="denoising", disable=not call.request.progress) as bar,
    ):
        # Build the denoiser: x, level -> x0.
        denoiser = build_denoiser(pipeline, call, initial, segments, counter)
        mask_blend = initial.mask_blend
        if mask_blend is not None:
            denoiser = mask_blend.wrap(denoiser, levels[steps.start])

        # Take the solver's steps, without waiting for the device.
        draw = partial(noise.draw, call.shape[1:])
        for step in scheduler.sample(denoiser, latents, levels, draw, start=steps.start, stop=steps.stop):
            counter.step = step.index + 1
            sums.append(step.latents.sum())
            bar.update()
            index, latents, x0 = step.index - steps.start, step.latents, step.x0
            if mask_blend is not None:
                is_last = index == total - 1
                latents = mask_blend.blend(latents, CLEAN if is_last else step.level)
                x0 = mask_blend.blend(x0, CLEAN)
            current = PipelineStep(index, total, latents, x0, call.request.seeds, finish)
            if current.is_last:
                last = current
            else:
                yield current

    # The last step comes after the UNet is offloaded: its images need the memory to decode.
    if last is not None:
        yield last


@torch.inference_mode()
def _finish(pipeline: Pipeline, call: PipelineCall, sums: Sequence[Tensor], latents: Tensor) -> Images:
    _check_finite(sums, len(call.sampling.steps), dtype_of(pipeline.unet))
    if call.request.output_type == "latent":
        return latents
    memory = pipeline.memory
    if call.is_tiled and memory.decode_tile is None and isinstance(pipeline.decoder, VAEDecoder):
        memory = replace(memory, decode_tile=call.tile)
    images = decode_images(pipeline.decoder, latents, pipeline.device, memory)
    images = to_unit(images[..., : call.size[0], : call.size[1]])
    return export(images if call.composite is None else call.composite(images), call.request.output_type)


@dataclass(frozen=True, eq=False)
class PipelineStep:
    """One denoising step of a call.

    Attributes:
        index: number of the step, from 0; -1 for a call without steps.
        total: number of steps.
        latents: float32 [B, C, h, w], the latents after this step.
        x0: float32 [B, C, h, w], the denoiser's estimate of the clean latents.
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
        """Whether `images` returns the result rather than a preview."""
        return self.index == self.total - 1

    def images(self) -> Images:
        """The result at the last step, a preview at earlier ones, in the form of the call's `output_type`.

        Raises:
            NumericalError: the latents or the images have NaN or infinity; names the step.
        """
        return self._finish(self.latents if self.is_last else self.x0)


def run_to_end(stream: Callable[P, Iterator[PipelineStep]]) -> Callable[P, Output]:
    """Make a pipeline's `stream` into a function of the same arguments that runs it to the end for the result."""

    @wraps(stream)
    def call(*args: P.args, **kwargs: P.kwargs) -> Output:
        (last,) = deque(stream(*args, **kwargs), maxlen=1)
        return Output(last.images(), last.seeds)

    return call


def _check_finite(sums: Sequence[Tensor], total: int, dtype: torch.dtype) -> None:
    """Check the sum of the latents after each step, of `total`; waits for the device.

    Raises:
        NumericalError: names the first step with NaN or infinity.
    """
    finite = torch.stack(list(sums)).isfinite().tolist() if sums else []
    if not all(finite):
        step = finite.index(False) + 1
        is_float32 = dtype == torch.float32
        advice = "check the weights and guidance_scale" if is_float32 else 'try dtype="bfloat16" or "float32"'
        raise NumericalError(f"the latents have NaN or infinity from step {step} of {total} on; {advice}")


def _denoising_bytes(pipeline: Pipeline, call: PipelineCall) -> int:
    """A lower bound of the memory of a step: the weights, and four feature maps at the highest resolution."""
    unet, (count, _, height, width) = pipeline.unet, call.shape
    pixels = min(height, call.tile or height) * min(width, call.tile or width)
    rows = branches_at_once(pipeline, call) * count
    maps = 4 * rows * pixels * unet.config.block_out_channels[0]
    return weight_bytes(unet) + maps * unet.conv_in.weight.element_size()


@dataclass
class StepCounter:
    """The current step; a solver may evaluate other noise levels too, so a level does not determine the prompt."""

    step: int


def build_denoiser(
    pipeline: Pipeline,
    call: PipelineCall,
    initial: InitialLatents,
    segments: Sequence[PromptSegment],
    counter: StepCounter,
) -> Denoiser:
    """The denoiser of a call: (x, level) -> x0. What is constant over the call is computed once.

    Guidance combines the UNet's outputs for its branches; classifier-free guidance (arXiv:2207.12598, eq. 6) has two:

        guided = negative + guidance_scale * (positive - negative)

    Args:
        initial: image channels to concatenate to the latents, and class labels.
        segments: the UNet's conditioning at each step.
        counter: the current step; the caller advances it.
    """
    unet, guidance = pipeline.unet, call.request.guidance
    dtype, batch, total = dtype_of(unet), len(call.request), guidance.num_branches
    constants = [_constants(unet, call, initial, segment) for segment in segments]
    segment_of = {
        step: index for index, segment in enumerate(segments) for steps in segment.steps for step in steps
    }
    channels = None if initial.channels is None else initial.channels.to(segments[0].context.device, dtype)
    at_once = branches_at_once(pipeline, call)

    @cache
    def inputs_of(segment: int, branches: range) -> tuple[UNetConstants, Tensor | None]:
        rows = slice(branches.start * batch, branches.stop * batch)
        image = channels if channels is None or len(channels) == batch else channels[rows]
        return constants[segment][0].part(rows), image

    def predict_at(x: Tensor, level: NoiseLevel, count: int, place: tuple[slice, slice]) -> list[Tensor]:
        """The outputs of the last `count` branches for some rows and columns of x."""
        x, segment = x[..., *place].to(dtype), segment_of[counter.step]
        outputs: list[Tensor] = []
        for first in range(total - count, total, at_once):
            branches = range(first, min(first + at_once, total))
            constant, image = inputs_of(segment, branches)
            stacked = x
            if image is not None:  # x [B, C, h, w] -> [branches * B, C + K, h, w]
                stacked = torch.cat([repeat_rows(x, len(image)), image[..., *place]], dim=1)
            stacked = stacked.contiguous(memory_format=torch.channels_last)
            output = unet.step(stacked, constant, constants[segment][1][level.timestep])
            outputs += output.float().chunk(len(branches))
        return outputs

    def predict(x: Tensor, level: NoiseLevel, count: int) -> Sequence[Tensor]:
        if call.tile is None or not call.is_tiled:
            return predict_at(x, level, count, (slice(None), slice(None)))
        return in_tiles(
            lambda rows, columns: torch.stack(predict_at(x, level, count, (rows, columns))),
            (count, *x.shape),
            tile=call.tile,
            device=x.device,
        ).unbind()

    return guided(predict, call.sampling.scheduler.prediction_type, guidance)


def _constants(
    unet: UNet, call: PipelineCall, initial: InitialLatents, segment: PromptSegment
) -> tuple[UNetConstants, dict[float, int]]:
    """The UNet's constants during a segment, and timestep -> index of its time embedding in them."""
    scheduler, levels, _ = call.sampling
    evaluated = dict.fromkeys(
        level
        for steps in segment.steps
        for level in scheduler.evaluation_levels(levels, start=steps.start, stop=steps.stop)
    )
    timesteps = [level.timestep for level in evaluated]
    constants = unet.constants(
        segment.context.to(dtype_of(unet)),
        torch.tensor(timesteps, device=segment.context.device),
        class_labels=initial.class_labels,
        added=segment.added,
        guidance_scale=call.request.guidance_scale if unet.config.time_cond_proj_dim else None,
    )
    return constants, {timestep: index for index, timestep in enumerate(timesteps)}


def branches_at_once(pipeline: Pipeline, call: PipelineCall) -> int:
    """How many guidance branches of an image the UNet evaluates at once."""
    return 1 if pipeline.memory.sequential_guidance else call.request.guidance.num_branches


Images = list[Image.Image] | np.ndarray | Tensor


class Output(NamedTuple):
    """The result of a call.

    Attributes:
        images: by `output_type`: "pil" a list of images, "np" float32 [B, H, W, 3] in 0..1, "pt" float32 [B, 3, H, W]
            in 0..1 on the device, "latent" float32 [B, C, h, w] on the device. In the order of the prompts, the images
            of one prompt together.
        seeds: the seed of each image; with the same arguments it reproduces that image without the others.
    """

    images: Images
    seeds: tuple[int, ...]


def export(images: Tensor, output_type: OutputType) -> Images:
    """Convert images [B, 3, H, W] in 0..1 to `output_type`."""
    if output_type == "pil":
        return to_pil(images)
    return to_numpy(images) if output_type == "np" else images
