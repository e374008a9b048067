"""The way from noise to images that all pipelines take: text to context, denoising step by step, decoding."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial, wraps
from typing import ParamSpec

import torch
from torch import Tensor
from tqdm import tqdm

from latentgen.diffusion.schedule import CLEAN
from latentgen.errors import NumericalError
from latentgen.image import to_unit
from latentgen.memory import on_device, oom_hint, weight_bytes
from latentgen.models.unet import UNet
from latentgen.models.vae import VAEDecoder
from latentgen.pipelines.autoencoding import decode_images
from latentgen.pipelines.denoiser import Position, build_denoiser, encode_prompts, rows_at_once
from latentgen.pipelines.devices import dtype_of
from latentgen.pipelines.output import Images, Output, export
from latentgen.pipelines.run import ImageNoise, Run, Stages

P = ParamSpec("P")


@torch.inference_mode()
def denoise(stages: Stages, run: Run) -> Iterator[PipelineStep]:
    """Make the images of a run: every step, the last of which gives the result; at least one.

    Raises:
        NumericalError: NaN or infinity where an image was due; names the step.
        MemoryBudgetError: memory ran out; names the arguments that help.
    """
    count, _, height, width = run.shape
    pixels = min(height, run.tile or height) * min(width, run.tile or width)
    with oom_hint(
        f"denoising {count} image(s) of {run.size[1]}x{run.size[0]} pixels",
        partial(denoising_bytes, stages.unet, rows_at_once(stages, run) * count, pixels),
        'use fewer images at once, a smaller height and width, MemoryPolicy(attention="chunked", '
        'sequential_guidance=True, offload_idle=True, pack_weights=False), guidance_scale=1 or dtype="bfloat16"',
    ):
        yield from _steps(stages, run)


def _steps(stages: Stages, run: Run) -> Iterator[PipelineStep]:
    noise = ImageNoise(run.request.seeds, stages.device)
    begin = run.begin(noise)
    latents = begin.latents.contiguous(memory_format=torch.channels_last)
    scheduler, levels, steps = run.sampling
    total, check = len(steps), FiniteCheck()
    finish = partial(_finish, stages, run, check)
    if not steps:
        yield PipelineStep(-1, total, latents, latents, run.request.seeds, finish)
        return
    told, position = encode_prompts(stages, run), Position(steps.start)
    last: PipelineStep | None = None
    with (
        on_device(stages.unet, stages.device, offload=stages.memory.offload_idle),
        tqdm(total=total, desc="denoising", disable=not run.progress) as bar,
    ):
        denoiser, kept = build_denoiser(stages, run, begin, told, position), begin.kept
        if kept is not None:
            denoiser = kept.shown_to(denoiser, levels[steps.start])
        draw = partial(noise.draw, run.shape[1:])
        for step in scheduler.sample(denoiser, latents, levels, draw, start=steps.start, stop=steps.stop):
            position.step = step.index + 1
            check.watch(step.latents)
            bar.update()
            index, reached, x0 = step.index - steps.start, step.latents, step.x0
            if kept is not None:
                is_last = index == total - 1
                reached, x0 = (
                    kept.put_back(reached, CLEAN if is_last else step.level),
                    kept.put_back(x0, CLEAN),
                )
            current = PipelineStep(index, total, reached, x0, run.request.seeds, finish)
            if current.is_last:
                last = current
            else:
                yield current
    # The UNet has left the device by now, so that decoding has the room.
    if last is not None:
        yield last


@torch.inference_mode()
def _finish(stages: Stages, run: Run, check: FiniteCheck, latents: Tensor) -> Images:
    check.verify(len(run.sampling.steps), dtype_of(stages.unet))
    if run.output_type == "latent":
        return latents
    memory = stages.memory
    if run.is_tiled and memory.decode_tile is None and isinstance(stages.decoder, VAEDecoder):
        memory = replace(memory, decode_tile=run.tile)
    images = decode_images(stages.decoder, latents, stages.device, memory)
    images = to_unit(images[..., : run.size[0], : run.size[1]])
    return export(images if run.composite is None else run.composite(images), run.output_type)


@dataclass(frozen=True, eq=False)
class PipelineStep:
    """One step of a run that is under way.

    Attributes:
        index: number of the step, from 0; -1 for what a run without steps gives.
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
        if not self._sums:
            return
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
