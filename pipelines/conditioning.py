"""Builds the UNet's conditioning batch: prompt embeddings and SDXL's time ids, negative prompts first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from latentgen.errors import InputError
from latentgen.models.text import Conditioning, TextEncoder
from latentgen.models.unet import AddedConditioning
from latentgen.models.unet_config import UNetConfig
from latentgen.pipelines.arguments import as_negative_prompts, as_prompts
from latentgen.prompt_syntax import PromptSchedule, PromptSyntax, read_prompt
from latentgen.prompts import WeightedPrompt

Pair = tuple[int, int]

# One prompt of a call: text, precomputed embeddings [1, S, D], or None for zeros (SDXL's embeddings of no prompt).
PromptInput = PromptSchedule | Conditioning | None

# The number of time ids of SDXL's base model and of its refiner.
BASE_TIME_IDS = 6
REFINER_TIME_IDS = 5
_MAX_PIXELS = 2**20
_MAX_SCORE = 100.0
# The longest context that contexts of different lengths may be repeated to, in tokens.
_MAX_REPEATED_TOKENS = 2**14


@dataclass(frozen=True)
class SizeConditioning:
    """SDXL's size and crop conditioning (arXiv:2307.01952, section 2.2). Other model families ignore it.

    Attributes:
        original_size: height and width in pixels of the photograph before resizing; small values make blurry images.
            None is the size of the output.
        crops_coords_top_left: top and left of the crop, in pixels; (0, 0) centers the subject.
        target_size: height and width in pixels after cropping; None is the size of the output. The refiner takes an
            aesthetic score instead.
        aesthetic_score: of the prompt, about 2 to 7.
        negative_aesthetic_score: of the negative prompt.

    Raises:
        InputError: a value is not a pair of numbers, or out of range.
    """

    original_size: Pair | None = None
    crops_coords_top_left: Pair = (0, 0)
    target_size: Pair | None = None
    aesthetic_score: float = 6.0
    negative_aesthetic_score: float = 2.5

    def __post_init__(self) -> None:
        sizes = {"original_size": self.original_size, "target_size": self.target_size}
        for name, pair in sizes.items():
            if pair is not None:
                _check_pair(name, pair, lowest=1)
        _check_pair("crops_coords_top_left", self.crops_coords_top_left, lowest=0)
        scores = {
            "aesthetic_score": self.aesthetic_score,
            "negative_aesthetic_score": self.negative_aesthetic_score,
        }
        for name, score in scores.items():
            if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= _MAX_SCORE:
                raise InputError(f"{name}={score!r} must be a number from 0 to {_MAX_SCORE:g}; 6 is usual")


def _check_pair(name: str, pair: object, *, lowest: int) -> None:
    numbers = pair if isinstance(pair, tuple) else ()
    if len(numbers) != 2 or not all(type(n) is int and lowest <= n <= _MAX_PIXELS for n in numbers):
        raise InputError(
            f"{name}={pair!r} must be a tuple of two whole numbers of pixels, from {lowest} to {_MAX_PIXELS}"
        )


class PromptSegment(NamedTuple):
    """Steps during which no prompt switches, and their conditioning: context [R, S, D], pooled embeddings [R, P]."""

    steps: tuple[range, ...]
    conditioning: Conditioning


def encode_segments(
    encoder: TextEncoder,
    negatives: Sequence[PromptInput],
    prompts: Sequence[PromptInput],
    *,
    clip_skip: int,
    steps: range,
    device: torch.device,
) -> list[PromptSegment]:
    """Encode the negative prompts and then the prompts for the steps of a run, on the device; one segment per switch.

    Equal prompts are encoded once, and the encoding of one does not depend on the others. `clip_skip` is for the
    prompts alone, as in diffusers.
    """
    rows = [*((row, 0) for row in negatives), *((row, clip_skip) for row in prompts)]
    changes = {
        step for row, _ in rows if isinstance(row, PromptSchedule) for step, _ in row.changes if step in steps
    }
    spans: dict[tuple[WeightedPrompt | None, ...], list[range]] = {}
    for begin, end in pairwise((*sorted(changes | {steps.start}), steps.stop)):
        texts = tuple(row.at(begin) if isinstance(row, PromptSchedule) else None for row, _ in rows)
        spans.setdefault(texts, []).append(range(begin, end))
    skips = [skip for _, skip in rows]
    encoded = _encode_texts(encoder, [text for texts in spans for text in zip(texts, skips, strict=True)])
    return [
        PromptSegment(
            tuple(span),
            _join(
                [
                    encoded[text, skip] if text is not None else _moved(row, device)
                    for text, (row, skip) in zip(texts, rows, strict=True)
                ]
            ),
        )
        for texts, span in spans.items()
    ]


def _encode_texts(
    encoder: TextEncoder, items: Sequence[tuple[WeightedPrompt | None, int]]
) -> dict[tuple[WeightedPrompt, int], Conditioning]:
    """The conditioning [1, S, D] and [1, P] of each text with its clip_skip, S as long as the text needs."""
    encoded: dict[tuple[WeightedPrompt, int], Conditioning] = {}
    for skip in dict.fromkeys(skip for _, skip in reversed(items)):
        texts = list(dict.fromkeys(text for text, its_skip in items if its_skip == skip and text is not None))
        rows = _encode_each(encoder, texts, skip) if texts else []
        encoded |= {(text, skip): row for text, row in zip(texts, rows, strict=True)}
    return encoded


def _encode_each(encoder: TextEncoder, texts: Sequence[WeightedPrompt], clip_skip: int) -> list[Conditioning]:
    batch = encoder.encode(texts, clip_skip=clip_skip)
    # A long prompt pads the others of its batch to its length, so encode each on its own.
    if batch.context.shape[1] > encoder.window:
        return [encoder.encode([text], clip_skip=clip_skip) for text in texts]
    return conditioning_rows(batch)


def conditioning_rows(conditioning: Conditioning) -> list[Conditioning]:
    """Split a batch into rows [1, S, D] and [1, P]."""
    contexts, pooled = conditioning.context.split(1), conditioning.pooled
    return [
        Conditioning(context, None if pooled is None else pooled[index : index + 1])
        for index, context in enumerate(contexts)
    ]


def _moved(row: PromptInput, device: torch.device) -> Conditioning | None:
    if not isinstance(row, Conditioning):
        return None
    return Conditioning(row.context.to(device), None if row.pooled is None else row.pooled.to(device))


def _join(parts: Sequence[Conditioning | None]) -> Conditioning:
    """One batch of rows; None is a row of zeros."""
    some = next(part for part in parts if part is not None)
    zeros = Conditioning(
        torch.zeros_like(some.context), None if some.pooled is None else torch.zeros_like(some.pooled)
    )
    rows = [zeros if part is None else part for part in parts]
    pooled = [row.pooled for row in rows if row.pooled is not None]
    return Conditioning(
        join_contexts([row.context for row in rows]), torch.cat(pooled) if len(pooled) == len(rows) else None
    )


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


def takes_added_conditioning(config: UNetConfig) -> bool:
    """Whether a UNet takes SDXL's added conditioning: pooled embeddings and time ids."""
    return config.addition_embed_type is not None


def time_id_count(config: UNetConfig, pooled_width: int) -> int:
    """The number of time ids that a UNet takes; 0 without added conditioning, -1 if its widths do not match."""
    if not takes_added_conditioning(config):
        return 0
    assert config.projection_class_embeddings_input_dim is not None
    assert config.addition_time_embed_dim is not None
    numbers, rest = divmod(
        config.projection_class_embeddings_input_dim - pooled_width, config.addition_time_embed_dim
    )
    return numbers if rest == 0 else -1


def time_ids(
    sizes: SizeConditioning, count: int, size: Pair, *, negatives: int, prompts: int
) -> Tensor | None:
    """SDXL's time ids [negatives + prompts, count] for images of `size` (height, width) pixels; None if count is 0."""
    if count == 0:
        return None
    placed = (*(sizes.original_size or size), *sizes.crops_coords_top_left)
    if count == REFINER_TIME_IDS:
        negative, positive = (*placed, sizes.negative_aesthetic_score), (*placed, sizes.aesthetic_score)
    else:
        negative = positive = (*placed, *(sizes.target_size or size))
    return torch.tensor([negative] * negatives + [positive] * prompts, dtype=torch.float32)


def added_conditioning(pooled: Tensor | None, ids: Tensor | None) -> AddedConditioning | None:
    """SDXL's added conditioning: pooled embeddings [R, P] and time ids [R, K]; None without ids."""
    if ids is None:
        return None
    assert pooled is not None
    return AddedConditioning(pooled, ids.to(pooled.device))


# The prompts that a call accepts.
Prompts = str | Sequence[str] | Conditioning


@dataclass(frozen=True)
class PromptReader:
    """Reads the prompts of one call.

    Attributes:
        syntax: which characters are markup.
        steps: of the whole run, for prompts that switch.
        context_width: channels D of the UNet's context.
        pooled_width: channels P of the UNet's pooled embeddings; None if it takes none.
    """

    syntax: PromptSyntax
    steps: int
    context_width: int
    pooled_width: int | None

    def prompts(self, prompt: Prompts) -> tuple[PromptInput, ...]:
        """One entry for each prompt.

        Raises:
            InputError: a prompt is invalid; names it.
        """
        if isinstance(prompt, Conditioning):
            return self._from_embeddings("prompt", prompt)
        return self._read(as_prompts("prompt", prompt))

    def negatives(self, negative_prompt: Prompts, count: int) -> tuple[PromptInput, ...]:
        """One entry for each of `count` prompts; a single negative prompt is used for all.

        Raises:
            InputError: a prompt is invalid; names it.
        """
        if not isinstance(negative_prompt, Conditioning):
            return self._read(as_negative_prompts(negative_prompt, count))
        rows = self._from_embeddings("negative_prompt", negative_prompt)
        if len(rows) not in (1, count):
            raise InputError(
                f"negative_prompt has {len(rows)} rows for {count} prompts; pass one or one for each"
            )
        return rows * (count if len(rows) == 1 else 1)

    def _read(self, texts: Sequence[str]) -> tuple[PromptInput, ...]:
        return tuple(read_prompt(text, self.syntax, self.steps) for text in texts)

    def _from_embeddings(self, name: str, embeddings: Conditioning) -> tuple[PromptInput, ...]:
        context = _checked(
            f"{name}.context", embeddings.context, "[B, S, D]", (None, None, self.context_width)
        )
        if self.pooled_width is None:
            return tuple(conditioning_rows(Conditioning(context)))
        if embeddings.pooled is None:
            raise InputError(
                f"{name}.pooled is missing; this model needs Conditioning(context, pooled), in diffusers "
                "prompt_embeds and pooled_prompt_embeds"
            )
        shape = (context.shape[0], self.pooled_width)
        return tuple(
            conditioning_rows(
                Conditioning(context, _checked(f"{name}.pooled", embeddings.pooled, "[B, P]", shape))
            )
        )


def _checked(name: str, tensor: object, layout: str, shape: tuple[int | None, ...]) -> Tensor:
    """Check for a finite floating-point tensor of a shape, in which None is any size above 0."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.is_meta:
        is_tensor = isinstance(tensor, Tensor)
        actual = f"{tensor.dtype} on {tensor.device}" if is_tensor else type(tensor).__name__
        raise InputError(f"{name} must be a floating-point tensor {layout} with values, not {actual}")
    matches = tensor.ndim == len(shape) and all(
        size == expected if expected is not None else size > 0
        for size, expected in zip(tensor.shape, shape, strict=True)
    )
    if not matches:
        expected = ", ".join("any" if size is None else str(size) for size in shape)
        raise InputError(f"{name} {layout} has the shape {list(tensor.shape)}; this model needs [{expected}]")
    if not bool(torch.isfinite(tensor).all()):
        raise InputError(f"{name} has NaN or infinity; it must be finite")
    return tensor
