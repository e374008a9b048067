"""Guidance: combines the network's outputs with and without conditions into the x0 of a denoiser."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from latentgen.diffusion.prediction import Denoised, Denoiser, PredictionType, to_x0
from latentgen.diffusion.schedule import NoiseLevel
from latentgen.errors import InputError

# x [B, C, H, W], its noise level, the number of branches -> the raw output of each branch, [B, C, H, W], from the least
# conditioned to the fully conditioned.
Predict = Callable[[Tensor, NoiseLevel, int], Sequence[Tensor]]


class Guidance:
    """Combines several raw outputs for one image, each under another condition, into one.

    Attributes:
        num_branches: how many outputs it combines; the first is the least conditioned.
    """

    num_branches: int

    def branches_at(self, level: NoiseLevel) -> int:
        """How many of the outputs, the last ones, are evaluated at a noise level: all, or 1 without guidance."""
        return self.num_branches

    def __call__(self, outputs: Sequence[Tensor]) -> Tensor:
        """Combine the outputs of `branches_at`, each [B, C, H, W], into one [B, C, H, W]."""
        raise NotImplementedError


def is_guided(guidance_scale: float) -> bool:
    """Whether a guidance scale needs the unconditional output at all: at 1 and below it does not.

    Raises InputError for NaN and infinity.
    """
    if not math.isfinite(guidance_scale):
        raise InputError(f"guidance_scale is {guidance_scale}; it must be a finite number, 1 for no guidance")
    return guidance_scale > 1.0


@dataclass(frozen=True)
class ClassifierFree(Guidance):
    """Classifier-free guidance (arXiv:2207.12598, eq. 6, with w = scale - 1).

    Takes the unconditional and the conditional output and gives
    ``unconditional + scale * (conditional - unconditional)``; at a scale of 1 or less, only the conditional output.

    Raises InputError for a scale of NaN or infinity.
    """

    scale: float
    num_branches: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_branches", 2 if is_guided(self.scale) else 1)

    def __call__(self, outputs: Sequence[Tensor]) -> Tensor:
        if self.num_branches == 1:
            (conditional,) = outputs
            return conditional
        unconditional, conditional = outputs
        return torch.lerp(unconditional, conditional, self.scale)


@dataclass(frozen=True)
class TextAndImage(Guidance):
    """Guidance by an image and by a text, each with its own scale (arXiv:2211.09800, eq. 3).

    Takes the unconditional output, the output for only the image, and the output for image and text.
    """

    scale: float
    image_scale: float
    num_branches: int = 3

    def __call__(self, outputs: Sequence[Tensor]) -> Tensor:
        unconditional, image, both = outputs
        return unconditional + self.image_scale * (image - unconditional) + self.scale * (both - image)


@dataclass(frozen=True)
class PerpendicularNegative(Guidance):
    """Perp-Neg: the component of the negative direction orthogonal to the positive one (arXiv:2304.04968, eq. 7).

    Takes the outputs for the empty prompt, the negative prompt and the prompt.
    """

    scale: float
    negative_scale: float = 1.0
    num_branches: int = 3

    def __call__(self, outputs: Sequence[Tensor]) -> Tensor:
        unconditional, negative, conditional = outputs
        towards, away = conditional - unconditional, negative - unconditional
        dims = tuple(range(1, towards.ndim))
        # Equal outputs have no direction to project onto: avoid dividing by zero.
        norm = towards.square().sum(dims, keepdim=True).clamp(min=torch.finfo(towards.dtype).tiny)
        along = (towards * away).sum(dims, keepdim=True) / norm
        return unconditional + self.scale * (towards - self.negative_scale * (away - along * towards))


@dataclass(frozen=True)
class Rescaled(Guidance):
    """Rescales the result of a guidance to the standard deviation of the conditional output.

    phi blends the two (arXiv:2305.08891, eq. 15 and 16): 0 keeps the result, 1 rescales it fully; the paper uses 0.7.
    """

    guidance: Guidance
    phi: float
    num_branches: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_branches", self.guidance.num_branches)

    def branches_at(self, level: NoiseLevel) -> int:
        return self.guidance.branches_at(level)

    def __call__(self, outputs: Sequence[Tensor]) -> Tensor:
        guided, dims = self.guidance(outputs), tuple(range(1, outputs[-1].ndim))
        ratio = outputs[-1].std(dims, keepdim=True) / guided.std(dims, keepdim=True)
        return guided * torch.lerp(torch.ones_like(ratio), ratio, self.phi)


@dataclass(frozen=True)
class GuidanceInterval(Guidance):
    """Limits a guidance to an interval of noise levels (arXiv:2404.07724).

    It applies from below timestep `highest` down to `lowest`; elsewhere only the conditional output is computed.
    """

    guidance: Guidance
    lowest: float
    highest: float
    num_branches: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_branches", self.guidance.num_branches)

    def branches_at(self, level: NoiseLevel) -> int:
        """The number of the wrapped guidance, or 1 outside the interval."""
        return self.guidance.branches_at(level) if self.lowest <= level.timestep < self.highest else 1

    def __call__(self, outputs: Sequence[Tensor]) -> Tensor:
        return self.guidance(outputs) if len(outputs) == self.num_branches else outputs[-1]


@dataclass(frozen=True)
class CFGPlusPlus(Guidance):
    """CFG++ (arXiv:2406.08070, algorithm 2): interpolates between the two outputs instead of extrapolating.

    scale, the paper's lambda, is 0..1. A step keeps the noise of the unconditional output; see `guided`.
    """

    scale: float
    num_branches: int = 2

    def __call__(self, outputs: Sequence[Tensor]) -> Tensor:
        unconditional, conditional = outputs
        return torch.lerp(unconditional, conditional, self.scale)


def guided(predict: Predict, prediction_type: PredictionType, guidance: Guidance) -> Denoiser:
    """A denoiser that combines the raw outputs of all branches and converts the result to x0."""

    def denoise(x: Tensor, level: NoiseLevel) -> Tensor | Denoised:
        outputs = predict(x, level, guidance.branches_at(level))
        x0 = to_x0(guidance(outputs), x, level, prediction_type)
        if isinstance(guidance, CFGPlusPlus):
            return Denoised(x0, to_x0(outputs[0], x, level, prediction_type))
        return x0

    return denoise
