"""The UNet of a run as a denoiser: what it is told of the prompts, and all that is constant computed once."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from latentgen.diffusion.guidance import guided
from latentgen.diffusion.prediction import Denoiser
from latentgen.diffusion.schedule import NoiseLevel
from latentgen.memory import in_tiles, on_device
from latentgen.models.unet import AddedConditioning, UNet, UNetConstants
from latentgen.models.unet_blocks import repeat_rows
from latentgen.pipelines.conditioning import added_conditioning, encode_rows, time_id_count, time_ids
from latentgen.pipelines.devices import dtype_of
from latentgen.pipelines.run import Beginning, Run, Stages
from latentgen.prompt_syntax import PromptSchedule

# Rows and columns of latents.
Place = tuple[slice, slice]
EVERYWHERE: Place = (slice(None), slice(None))


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


def encode_prompts(stages: Stages, run: Run) -> list[Told]:
    """What the UNet is told: the same at all steps, unless a prompt switches."""
    request, negatives = run.request, run.guided.negatives
    rows = negatives, request.prompts
    module = stages.text_encoder.module
    # Whoever brings all of the conditioning along does not wait for the text encoder's weights.
    needed = any(isinstance(row, PromptSchedule) for part in rows for row in part)
    with on_device(module, stages.device, offload=stages.memory.offload_idle) if needed else nullcontext():
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
        negatives=len(negatives),
        prompts=len(request),
    )
    return [
        Told(steps, conditioning.context, added_conditioning(conditioning.pooled, ids))
        for steps, conditioning in stretches
    ]


def build_denoiser(
    stages: Stages, run: Run, begin: Beginning, told: Sequence[Told], position: Position
) -> Denoiser:
    """A denoiser for one run, with all that is constant over it computed once.

    Args:
        begin: what is concatenated to the latents, and class labels.
        told: what the UNet is told, at which steps.
        position: the step that is being taken, kept up to date by the caller.
    """
    unet, guidance = stages.unet, run.guided.guidance
    dtype = dtype_of(unet)
    constants = [_constants(unet, run, begin, part) for part in told]
    at = {step: index for index, part in enumerate(told) for steps in part.steps for step in steps}
    channels = None if begin.channels is None else begin.channels.to(told[0].context.device, dtype)
    batch, at_once = len(run.request), rows_at_once(stages, run)

    @cache
    def part_of(index: int, first: int, last: int) -> tuple[UNetConstants, Tensor | None]:
        rows = slice(first * batch, last * batch)
        shown = channels if channels is None or len(channels) == batch else channels[rows]
        return constants[index][0].part(rows), shown

    def predict_rows(x: Tensor, level: NoiseLevel, rows: range, place: Place) -> tuple[Tensor, ...]:
        index = at[position.step]
        part, shown = part_of(index, rows.start, rows.stop)
        if shown is not None:
            x = torch.cat([repeat_rows(x, len(shown)), shown[..., *place]], dim=1)
        x = x.contiguous(memory_format=torch.channels_last)
        return unet.step(x, part, constants[index][1][level.timestep]).float().chunk(len(rows))

    def predict_at(x: Tensor, level: NoiseLevel, count: int, place: Place) -> Sequence[Tensor]:
        x = (x if place is EVERYWHERE else x[..., *place]).to(dtype)
        total = guidance.num_branches
        if count <= at_once:
            return predict_rows(x, level, range(total - count, total), place)
        parts = (range(first, min(first + at_once, total)) for first in range(total - count, total, at_once))
        return [row for part in parts for row in predict_rows(x, level, part, place)]

    def predict(x: Tensor, level: NoiseLevel, count: int) -> Sequence[Tensor]:
        if run.tile is None or not run.is_tiled:
            return predict_at(x, level, count, EVERYWHERE)
        return in_tiles(
            lambda rows, columns: torch.stack(list(predict_at(x, level, count, (rows, columns)))),
            (count, *x.shape),
            tile=run.tile,
            device=x.device,
        ).unbind()

    return guided(predict, run.sampling.scheduler.prediction_type, guidance)


def _constants(unet: UNet, run: Run, begin: Beginning, told: Told) -> tuple[UNetConstants, dict[float, int]]:
    """What is constant while the UNet is told the same, and which of its time embeddings is that of a timestep."""
    scheduler, levels, _ = run.sampling
    visited = dict.fromkeys(
        level
        for steps in told.steps
        for level in scheduler.evaluation_levels(levels, start=steps.start, stop=steps.stop)
    )
    timesteps = [level.timestep for level in visited]
    constants = unet.constants(
        told.context.to(dtype_of(unet)),
        torch.tensor(timesteps, device=told.context.device),
        class_labels=begin.class_labels,
        added=told.added,
        guidance_scale=run.request.guidance_scale if unet.config.time_cond_proj_dim else None,
    )
    return constants, {timestep: index for index, timestep in enumerate(timesteps)}


def rows_at_once(stages: Stages, run: Run) -> int:
    """How many rows of an image's guidance the UNet sees at once."""
    return 1 if stages.memory.sequential_guidance else run.guided.guidance.num_branches
