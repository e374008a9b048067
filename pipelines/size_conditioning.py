"""SDXL's size and crop conditioning (arXiv:2307.01952, section 2.2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from latentgen.errors import InputError
from latentgen.pipelines.arguments import check_number

Pair = tuple[int, int]

# The number of time ids of SDXL's base model and of its refiner.
BASE_TIME_IDS = 6
REFINER_TIME_IDS = 5
_MAX_PIXELS = 2**20
_MAX_SCORE = 100.0


@dataclass(frozen=True)
class SizeConditioning:
    """SDXL's size and crop conditioning. Other model families ignore it.

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
        for name, lowest in (("original_size", 1), ("crops_coords_top_left", 0), ("target_size", 1)):
            pair = getattr(self, name)
            numbers = pair if isinstance(pair, tuple) else ()
            is_pair = len(numbers) == 2 and all(
                type(number) is int and lowest <= number <= _MAX_PIXELS for number in numbers
            )
            if not is_pair and (pair is not None or lowest == 0):
                raise InputError(
                    f"{name}={pair!r} must be a tuple of two whole numbers of pixels, from {lowest} to {_MAX_PIXELS}"
                )
        for name in ("aesthetic_score", "negative_aesthetic_score"):
            check_number(name, getattr(self, name), 0, _MAX_SCORE, "6 is usual")


def time_ids(sizes: SizeConditioning, count: int, size: Pair, *, negatives: int, prompts: int) -> Tensor:
    """SDXL's time ids [negatives + prompts, count] for images of `size` (height, width) pixels."""
    placed = (*(sizes.original_size or size), *sizes.crops_coords_top_left)
    if count == REFINER_TIME_IDS:
        negative, positive = (*placed, sizes.negative_aesthetic_score), (*placed, sizes.aesthetic_score)
    else:
        negative = positive = (*placed, *(sizes.target_size or size))
    return torch.tensor([negative] * negatives + [positive] * prompts, dtype=torch.float32)
