"""Guidance: from what the network puts out, with and without its conditions, to one denoiser."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from latentgen.diffusion.prediction import Denoiser, PredictionType, to_x0
from latentgen.diffusion.schedule import NoiseLevel
from latentgen.errors import InputError

# x [B, C, H, W] at a noise level -> the raw outputs that a guidance asks for, each [B, C, H, W].
Predict = Callable[[Tensor, NoiseLevel], Sequence[Tensor]]


class Guidance(Protocol):
    """How several raw outputs for one image, each under other conditions, become one."""

    @property
    def rows(self) -> int:
        """How many outputs it takes, the least conditioned first."""
        ...

    def __call__(self, outputs: Sequence[Tensor]) -> Tensor:
        """Combine the outputs, each [B, C, H, W]."""
        ...


def is_guided(guidance_scale: float) -> bool:
    """Whether a guidance scale needs the unconditional output at all: at 1 and below it does not.

    Raises InputError for NaN and infinity.
    """
    if not math.isfinite(guidance_scale):
        raise InputError(f"guidance_scale is {guidance_scale}; it must be a finite number, 1 for no guidance")
    return guidance_scale > 1.0


@dataclass(frozen=True)
class ClassifierFree:
    """Classifier-free guidance (arXiv 2207.12598, eq. 6, its w being scale - 1).

    Takes the unconditional and the conditional output and gives
    ``unconditional + scale * (conditional - unconditional)``; at a scale of 1 and below, the conditional one alone.

    Raises InputError for a scale of NaN or infinity.
    """

    scale: float

    def __post_init__(self) -> None:
        is_guided(self.scale)

    @property
    def rows(self) -> int:
        """2, or 1 without guidance."""
        return 2 if is_guided(self.scale) else 1

    def __call__(self, outputs: Sequence[Tensor]) -> Tensor:
        """Combine the outputs, each [B, C, H, W]."""
        if self.rows == 1:
            (conditional,) = outputs
            return conditional
        unconditional, conditional = outputs
        return torch.lerp(unconditional, conditional, self.scale)


@dataclass(frozen=True)
class TextAndImage:
    """Guidance by an image and by a text, each with a scale of its own (arXiv:2211.09800, eq. 3).

    Takes the unconditional output, that for the image alone and that for image and text.
    """

    scale: float
    image_scale: float
    rows: int = 3

    def __call__(self, outputs: Sequence[Tensor]) -> Tensor:
        """Combine the outputs, each [B, C, H, W]."""
        unconditional, image, both = outputs
        return unconditional + self.image_scale * (image - unconditional) + self.scale * (both - image)


def guided(predict: Predict, prediction_type: PredictionType, guidance: Guidance) -> Denoiser:
    """The denoiser that combines raw outputs and then turns the one they make into x0."""

    def denoise(x: Tensor, level: NoiseLevel) -> Tensor:
        return to_x0(guidance(predict(x, level)), x, level, prediction_type)

    return denoise
