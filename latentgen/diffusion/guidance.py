"""Guidance: from what the network puts out, with and without the prompt, to one denoiser."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from latentgen.diffusion.prediction import Denoiser, PredictionType, to_x0
from latentgen.diffusion.schedule import NoiseLevel
from latentgen.errors import InputError

# x [B, C, H, W] at a noise level -> the raw outputs (unconditional or None, conditional), each [B, C, H, W].
Predict = Callable[[Tensor, NoiseLevel], tuple[Tensor | None, Tensor]]


def is_guided(guidance_scale: float) -> bool:
    """Whether a guidance scale needs the unconditional output at all: at 1 and below it does not.

    Raises InputError for NaN and infinity.
    """
    if not math.isfinite(guidance_scale):
        raise InputError(f"guidance_scale is {guidance_scale}; it must be a finite number, 1 for no guidance")
    return guidance_scale > 1.0


def classifier_free(predict: Predict, prediction_type: PredictionType, guidance_scale: float) -> Denoiser:
    """Classifier-free guidance (arXiv 2207.12598, eq. 6, its w being guidance_scale - 1).

    The raw outputs are combined, ``unconditional + guidance_scale * (conditional - unconditional)``, and then
    turned into x0. Where `is_guided` is false, predict may give None for the unconditional output; it is not
    looked at.
    """
    guided = is_guided(guidance_scale)

    def denoise(x: Tensor, level: NoiseLevel) -> Tensor:
        unconditional, output = predict(x, level)
        if guided:
            if unconditional is None:
                raise InputError(f"guidance_scale {guidance_scale} needs an unconditional output")
            output = torch.lerp(unconditional, output, guidance_scale)
        return to_x0(output, x, level, prediction_type)

    return denoise
