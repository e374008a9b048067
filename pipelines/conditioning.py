"""What the prompts of a run, and its sizes, become for the UNet: one row for each image, negative rows first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from latentgen.errors import InputError
from latentgen.models.text import Conditioning, TextEncoder
from latentgen.models.unet import AddedConditioning
from latentgen.models.unet_config import UNetConfig

Pair = tuple[int, int]

# How many numbers SDXL's base model and its refiner are told besides the text.
BASE_TIME_IDS = 6
REFINER_TIME_IDS = 5
_MAX_PIXELS = 2**20
_MAX_SCORE = 100.0


@dataclass(frozen=True)
class SizeConditioning:
    """What SDXL is told of the sizes of the image that it draws (arXiv:2307.01952, section 2.2).

    Other families are not told of sizes and pass it over.

    Attributes:
        original_size: height and width in pixels of the photograph that the image is to look like; small ones look
            upscaled. None is the image's own size.
        crops_coords_top_left: from where, in pixels, that photograph was cropped; (0, 0) centres the subject.
        target_size: height and width in pixels after cropping; None is the image's own size. The refiner has the next
            two in its place.
        aesthetic_score: how pleasing the image is to be, about 2 to 7.
        negative_aesthetic_score: likewise for what guidance leads away from.

    Raises:
        InputError: a value is not a pair of numbers, or out of bounds.
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


def encode_rows(
    encoder: TextEncoder, negatives: Sequence[str | None], prompts: Sequence[str], *, clip_skip: int
) -> Conditioning:
    """The conditioning [R, S, D] and [R, P] of the negative prompts and then of the prompts.

    Equal rows are encoded once, and a row does not depend on those beside it. A negative prompt None is all zeros,
    which is how SDXL was trained without a prompt. `clip_skip` is for the prompts alone, as in diffusers.
    """
    wanted = [*((row, 0) for row in negatives), *((row, clip_skip) for row in prompts)]
    known: dict[tuple[str | None, int], Conditioning] = {}
    for skip in dict.fromkeys(skip for _, skip in reversed(wanted)):
        rows = list(dict.fromkeys(row for row, of in wanted if of == skip and row is not None))
        encoded = _encode_apart(encoder, rows, skip) if rows else []
        known |= {(row, skip): conditioning for row, conditioning in zip(rows, encoded, strict=True)}
    some = next(iter(known.values()))
    known[None, 0] = Conditioning(torch.zeros_like(some.context), torch.zeros_like(some.pooled))
    parts = [known[row] for row in wanted]
    return Conditioning(
        join_contexts([part.context for part in parts]), torch.cat([part.pooled for part in parts])
    )


def _encode_apart(encoder: TextEncoder, rows: Sequence[str], clip_skip: int) -> list[Conditioning]:
    """The conditioning [1, S, D] and [1, P] of each row, S as long as the row needs."""
    together = encoder.encode(rows, clip_skip=clip_skip)
    if together.context.shape[1] > encoder.window:
        return [encoder.encode([row], clip_skip=clip_skip) for row in rows]
    return [
        Conditioning(*part) for part in zip(together.context.split(1), together.pooled.split(1), strict=True)
    ]


def join_contexts(contexts: Sequence[Tensor]) -> Tensor:
    """Join contexts [1, S, D] of different lengths S to one batch [B, lcm of S, D].

    A context is repeated until it is long enough. Attention over keys that are all repeated equally often is
    unchanged, so an image does not depend on the prompts beside its own, as it would with empty chunks.
    """
    length = math.lcm(*(context.shape[1] for context in contexts))
    return torch.cat([context.repeat(1, length // context.shape[1], 1) for context in contexts])


def time_id_count(config: UNetConfig, pooled_width: int) -> int:
    """How many numbers a UNet with added conditioning is told besides the text; 0 for one without."""
    if config.addition_embed_type is None:
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
    """The numbers [negatives + prompts, count] that accompany the rows of images of `size` (height, width) in pixels.

    None where the UNet takes no such numbers (`count` 0).
    """
    if count == 0:
        return None
    placed = (*(sizes.original_size or size), *sizes.crops_coords_top_left)
    if count == REFINER_TIME_IDS:
        negative, positive = (*placed, sizes.negative_aesthetic_score), (*placed, sizes.aesthetic_score)
    else:
        negative = positive = (*placed, *(sizes.target_size or size))
    return torch.tensor([negative] * negatives + [positive] * prompts, dtype=torch.float32)


def added_conditioning(pooled: Tensor, ids: Tensor | None) -> AddedConditioning | None:
    """What SDXL's UNet is given besides the context: `pooled` [R, P] and `ids` [R, K]; None without ids."""
    return None if ids is None else AddedConditioning(pooled, ids.to(pooled.device))
