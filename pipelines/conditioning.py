"""Builds the UNet's conditioning batch: prompt embeddings and SDXL's time ids, negative prompts first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from latentgen.errors import InputError
from latentgen.memory import on_device
from latentgen.models.text import Conditioning, TextEncoder
from latentgen.models.unet import AddedConditioning
from latentgen.pipelines.arguments import as_prompts, check_tensor
from latentgen.pipelines.size_conditioning import SizeConditioning, time_ids
from latentgen.prompts import PromptSchedule, PromptSyntax, WeightedPrompt, read_prompt

if TYPE_CHECKING:
    from latentgen.pipelines.base import Pipeline
    from latentgen.pipelines.call import PipelineCall

# The prompts that a call accepts.
Prompts = str | Sequence[str] | Conditioning
# One prompt of a call: text, precomputed embeddings [1, S, D], or None for zeros (SDXL's embeddings of no prompt).
PromptInput = PromptSchedule | Conditioning | None
# The longest context that contexts of different lengths may be repeated to, in tokens.
_MAX_REPEATED_TOKENS = 2**14


def read_prompts(
    pipeline: Pipeline, syntax: PromptSyntax, steps: int, name: str, prompts: Prompts
) -> tuple[PromptInput, ...]:
    """Read the prompts of the argument `name` for a run of `steps` steps; one entry for each prompt.

    Raises:
        InputError: a prompt is invalid; names it.
    """
    if not isinstance(prompts, Conditioning):
        return tuple(read_prompt(text, syntax, steps) for text in as_prompts(name, prompts))
    encoder = pipeline.text_encoder
    context_shape = (None, None, encoder.context_width)
    context = check_tensor(f"{name}.context", prompts.context, "[B, S, D]", context_shape)
    pooled = None
    if pipeline.is_sdxl:
        pooled_shape = (context.shape[0], encoder.pooled_width)
        pooled = check_tensor(f"{name}.pooled", prompts.pooled, "[B, P]", pooled_shape)
    return tuple(_rows(Conditioning(context, pooled)))


class PromptSegment(NamedTuple):
    """Steps during which no prompt changes, and the UNet's conditioning, negative branches first.

    Attributes:
        steps: the steps.
        context: [branches * B, S, D].
        added: SDXL's pooled embeddings [branches * B, P] and time ids.
    """

    steps: tuple[range, ...]
    context: Tensor
    added: AddedConditioning | None


def encode_prompts(pipeline: Pipeline, call: PipelineCall) -> list[PromptSegment]:
    """The UNet's conditioning: one segment for all steps, or one for each change of a prompt.

    Equal prompts are encoded once, and the encoding of one does not depend on the others. `clip_skip` applies
    only to the positive prompts, as in diffusers.
    """
    request, steps, device = call.request, call.sampling.steps, pipeline.device
    rows = [*((row, 0) for row in request.negatives), *((row, request.clip_skip) for row in request.prompts)]
    schedules = [row for row, _ in rows if isinstance(row, PromptSchedule)]
    changes = {step for row in schedules for step, _ in row.changes if step in steps}
    spans: dict[tuple[WeightedPrompt | None, ...], list[range]] = {}
    for begin, end in pairwise((*sorted(changes | {steps.start}), steps.stop)):
        texts = tuple(row.at(begin) if isinstance(row, PromptSchedule) else None for row, _ in rows)
        spans.setdefault(texts, []).append(range(begin, end))

    # If all prompts are precomputed embeddings, the text encoder is not moved to the device.
    encoder, config = pipeline.text_encoder, pipeline.unet.config
    offload = pipeline.memory.offload_idle
    with on_device(encoder.module, device, offload=offload) if schedules else nullcontext():
        skips = [skip for _, skip in rows]
        encoded = _encode_texts(encoder, [item for texts in spans for item in zip(texts, skips, strict=True)])

    ids = None
    if config.is_sdxl:
        sizes = request.size_conditioning or SizeConditioning()
        count = config.time_id_count(encoder.pooled_width)
        ids = time_ids(sizes, count, call.size, negatives=len(request.negatives), prompts=len(request))
        ids = ids.to(device)
    segments = []
    for texts, span in spans.items():
        parts = [
            encoded[text, skip] if text is not None else _moved(row, device)
            for text, (row, skip) in zip(texts, rows, strict=True)
        ]
        context, pooled = _join(parts)
        added = None if ids is None or pooled is None else AddedConditioning(pooled, ids)
        segments.append(PromptSegment(tuple(span), context, added))
    return segments


def _encode_texts(
    encoder: TextEncoder, items: Sequence[tuple[WeightedPrompt | None, int]]
) -> dict[tuple[WeightedPrompt, int], Conditioning]:
    """The conditioning [1, S, D] and [1, P] of each text with its clip_skip, S as long as the text needs."""
    encoded: dict[tuple[WeightedPrompt, int], Conditioning] = {}
    for clip_skip in {skip for _, skip in items}:
        texts = list(dict.fromkeys(text for text, skip in items if skip == clip_skip and text is not None))
        if not texts:
            continue
        batch = encoder.encode(texts, clip_skip=clip_skip)
        rows = _rows(batch)
        # A long prompt pads the others of its batch to its length, so encode each on its own.
        if batch.context.shape[1] > encoder.window:
            rows = [encoder.encode([text], clip_skip=clip_skip) for text in texts]
        encoded |= {(text, clip_skip): row for text, row in zip(texts, rows, strict=True)}
    return encoded


def _rows(conditioning: Conditioning) -> list[Conditioning]:
    """Split a batch into rows [1, S, D] and [1, P]."""
    contexts, pooled = conditioning.context.split(1), conditioning.pooled
    if pooled is None:
        return [Conditioning(context) for context in contexts]
    return [Conditioning(*row) for row in zip(contexts, pooled.split(1), strict=True)]


def _moved(row: PromptInput, device: torch.device) -> Conditioning | None:
    if not isinstance(row, Conditioning):
        return None
    return Conditioning(row.context.to(device), None if row.pooled is None else row.pooled.to(device))


def _join(parts: Sequence[Conditioning | None]) -> Conditioning:
    """One batch of rows; None is a row of zeros."""
    first = next(part for part in parts if part is not None)
    pooled = None if first.pooled is None else torch.zeros_like(first.pooled)
    zeros = Conditioning(torch.zeros_like(first.context), pooled)
    rows = [zeros if part is None else part for part in parts]
    context = join_contexts([row.context for row in rows])
    pooled = [row.pooled for row in rows if row.pooled is not None]
    return Conditioning(context, torch.cat(pooled) if len(pooled) == len(rows) else None)


def join_contexts(contexts: Sequence[Tensor]) -> Tensor:
    """Join contexts [1, S, D] of different lengths S into one batch [B, lcm of S, D].

    Each context is repeated to the common length. Attention does not change when all keys are repeated equally often,
    so an image does not depend on the other prompts of the batch, as it would with padding.

    Raises:
        InputError: the common length would be far longer than any of them.
    """
    lengths = sorted({context.shape[1] for context in contexts})
    length = math.lcm(*lengths)
    if length > max(_MAX_REPEATED_TOKENS, *lengths):
        raise InputError(
            f"prompts and negative prompts of {', '.join(map(str, lengths))} tokens cannot share a call: a common "
            f"length would be {length:,}; use one call for each length"
        )
    return torch.cat([context.repeat(1, length // context.shape[1], 1) for context in contexts])
