"""Guidance: from what the network puts out, with and without its conditions, to one denoiser."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from latentgen.diffusion.prediction import Denoised, Denoiser, PredictionType, to_x0
from latentgen.diffusion.schedule import NoiseLevel
from latentgen.errors import InputError

# x [B, C, H, W] at a noise level, and how many outputs are wanted -> the raw outputs under so many conditions, each
# [B, C, H, W], the least conditioned first and the fully conditioned last.
Predict = Callable[[Tensor, NoiseLevel, int], Sequence[Tensor]]


class Guidance(Protocol):
    """How several raw outputs for one image, each under other conditions, become one."""

    @property
    def num_branches(self) -> int:
        """How many outputs there are, the least conditioned first."""
        ...

    def branches_at(self, level: NoiseLevel) -> int:
        """How many of them, the last ones, are looked at at a noise level: all, or 1 where nothing is guided."""
        ...

    def __call__(self, outputs: Sequence[Tensor]) -> Tensor:
        """Combine the outputs of `branches_at`, each [B, C, H, W]."""
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
    """Classifier-free guidance (arXiv:2207.12598, eq. 6, its w being scale - 1).

    Takes the unconditional and the conditional output and gives
    ``unconditional + scale * (conditional - unconditional)``; at a scale of 1 and below, the conditional one alone.

    Raises InputError for a scale of NaN or infinity.
    """

    scale: float
    num_branches: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_branches", 2 if is_guided(self.scale) else 1)

    def branches_at(self, level: NoiseLevel) -> int:
        """All."""
        return self.num_branches

    def __call__(self, outputs: Sequence[Tensor]) -> Tensor:
        """Combine the outputs, each [B, C, H, W]."""
        if self.num_branches == 1:
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
    num_branches: int = 3

    def branches_at(self, level: NoiseLevel) -> int:
        """All."""
        return self.num_branches

    def __call__(self, outputs: Sequence[Tensor]) -> Tensor:
        """Combine the outputs, each [B, C, H, W]."""
        unconditional, image, both = outputs
        return unconditional + self.image_scale * (image - unconditional) + self.scale * (both - image)


@dataclass(frozen=True)
class PerpendicularNegative:
    """Guidance away from a negative prompt only where it does not speak against the prompt (arXiv:2304.04968, eq. 7).

    Takes the output for the empty prompt, that for the negative and that for the prompt. Of the direction to the
    negative, the part along the direction to the prompt is taken away, so that what both share is kept.
    """

    scale: float
    negative_scale: float = 1.0
    num_branches: int = 3

    def branches_at(self, level: NoiseLevel) -> int:
        """All."""
        return self.num_branches

    def __call__(self, outputs: Sequence[Tensor]) -> Tensor:
        """Combine the outputs, each [B, C, H, W]."""
        unconditional, negative, conditional = outputs
        towards, away = conditional - unconditional, negative - unconditional
        dims = tuple(range(1, towards.ndim))
        # Equal outputs have no direction to be along.
        norm = towards.square().sum(dims, keepdim=True).clamp(min=torch.finfo(towards.dtype).tiny)
        along = (towards * away).sum(dims, keepdim=True) / norm
        return unconditional + self.scale * (towards - self.negative_scale * (away - along * towards))


@dataclass(frozen=True)
class Rescaled:
    """Another guidance whose result keeps the standard deviation of the conditional output.

    phi is how far (arXiv:2305.08891, eq. 15 and 16): 0 not at all, 1 wholly; 0.7 is the paper's.
    """

    guidance: Guidance
    phi: float

    @property
    def num_branches(self) -> int:
        """Those of the guidance."""
        return self.guidance.num_branches

    def branches_at(self, level: NoiseLevel) -> int:
        """Those of the guidance."""
        return self.guidance.branches_at(level)

    def __call__(self, outputs: Sequence[Tensor]) -> Tensor:
        """Combine the outputs, each [B, C, H, W]."""
        guided, dims = self.guidance(outputs), tuple(range(1, outputs[-1].ndim))
        ratio = outputs[-1].std(dims, keepdim=True) / guided.std(dims, keepdim=True)
        return guided * torch.lerp(torch.ones_like(ratio), ratio, self.phi)


@dataclass(frozen=True)
class GuidanceInterval:
    """Another guidance at some noise levels alone, and none at the others (arXiv:2404.07724).

    It is at work from below timestep `highest` down to `lowest`; elsewhere only the conditional output is computed.
    """

    guidance: Guidance
    lowest: float
    highest: float

    @property
    def num_branches(self) -> int:
        """Those of the guidance."""
        return self.guidance.num_branches

    def branches_at(self, level: NoiseLevel) -> int:
        """Those of the guidance, or 1 outside."""
        return self.guidance.branches_at(level) if self.lowest <= level.timestep < self.highest else 1

    def __call__(self, outputs: Sequence[Tensor]) -> Tensor:
        """Combine the outputs, each [B, C, H, W]."""
        return self.guidance(outputs) if len(outputs) == self.num_branches else outputs[-1]


@dataclass(frozen=True)
class CFGPlusPlus:
    """CFG++ (arXiv:2406.08070, algorithm 2): an interpolation, not an extrapolation, of the two outputs.

    scale, the paper's lambda, is 0..1. The unconditional output tells what noise a step keeps, which `guided` sees to.
    """

    scale: float
    num_branches: int = 2

    def branches_at(self, level: NoiseLevel) -> int:
        """All."""
        return self.num_branches

    def __call__(self, outputs: Sequence[Tensor]) -> Tensor:
        """Combine the outputs, each [B, C, H, W]."""
        unconditional, conditional = outputs
        return torch.lerp(unconditional, conditional, self.scale)


def guided(predict: Predict, prediction_type: PredictionType, guidance: Guidance) -> Denoiser:
    """The denoiser that combines raw outputs and then turns the one they make into x0."""

    def denoise(x: Tensor, level: NoiseLevel) -> Tensor | Denoised:
        outputs = predict(x, level, guidance.branches_at(level))
        x0 = to_x0(guidance(outputs), x, level, prediction_type)
        if isinstance(guidance, CFGPlusPlus):
            return Denoised(x0, to_x0(outputs[0], x, level, prediction_type))
        return x0

    return denoise
