"""Prediction types: from a network's output to x0, from x0 and noise to the training target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from latentgen.diffusion.schedule import BatchNoiseLevel, NoiseLevel
from latentgen.errors import ConfigError

PredictionType = Literal["epsilon", "sample", "v_prediction", "flow_prediction"]

# x [B, C, H, W] at a noise level -> the predicted x0, of the shape and dtype of x.
Denoiser = Callable[[Tensor, NoiseLevel], "Tensor | Denoised"]


class Denoised(NamedTuple):
    """An alternative return value of a denoiser: a step uses x0, and the noise that leads from noise_x0 to x.

    Both are [B, C, H, W].
    """

    x0: Tensor
    noise_x0: Tensor


def add_noise(x0: Tensor, noise: Tensor, level: NoiseLevel | BatchNoiseLevel) -> Tensor:
    """A draw from q(x_t | x_0): ``alpha * x0 + sigma * noise``, shaped like x0 (arXiv 2006.11239, eq. 4)."""
    return level.alpha * x0 + level.sigma * noise


def to_x0(
    output: Tensor, x: Tensor, level: NoiseLevel | BatchNoiseLevel, prediction_type: PredictionType
) -> Tensor:
    """The predicted x0 of a network's output, in the dtype of x; output and x are [B, C, H, W].

    `epsilon` is the noise (arXiv 2006.11239), which does not determine x0 at zero signal-to-noise ratio (alpha 0);
    `sample` is x0; `v_prediction` is ``alpha * noise - sigma * x0`` (arXiv 2202.00512, appendix D), on a NoiseSchedule;
    `flow_prediction` is ``noise - x0``, the velocity from data to noise (arXiv 2209.03003, eq. 1, reversed in time),
    on a FlowSchedule.
    """
    output = output.to(x.dtype)
    if prediction_type == "sample":
        return output
    if prediction_type == "flow_prediction":
        return _less(x, level.sigma, output)
    if prediction_type == "epsilon":
        return _less(x, level.sigma, output).div_(level.alpha)
    return _less(level.alpha * x, level.sigma, output)


def _less(tensor: Tensor, scale: float | Tensor, other: Tensor) -> Tensor:
    """``tensor - scale * other``, a new tensor; a single operation if the scale is a number."""
    return tensor - scale * other if isinstance(scale, Tensor) else torch.sub(tensor, other, alpha=scale)


def from_x0(
    x0: Tensor, x: Tensor, level: NoiseLevel | BatchNoiseLevel, prediction_type: PredictionType
) -> Tensor:
    """The output for an x0; the inverse of `to_x0`."""
    noise = (x - level.alpha * x0) / level.sigma
    return target(x0, noise, level, prediction_type)


def target(
    x0: Tensor, noise: Tensor, level: NoiseLevel | BatchNoiseLevel, prediction_type: PredictionType
) -> Tensor:
    """The training target at ``add_noise(x0, noise, level)``."""
    if prediction_type == "sample":
        return x0
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "flow_prediction":
        return noise - x0
    return level.alpha * noise - level.sigma * x0


@dataclass(frozen=True)
class Clipping:
    """Bounds on a predicted x0, for models of data in -1..1; latents have no such bounds.

    Fields are named as in ``scheduler_config.json``. With thresholding, each sample is clipped at the
    dynamic_thresholding_ratio quantile s of its magnitudes, limited to 1..sample_max_value, and divided by s
    (arXiv 2205.11487, section 2.3); else with clip_sample at clip_sample_range. Raises ConfigError for invalid bounds.
    """

    clip_sample: bool = False
    clip_sample_range: float = 1.0
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0

    def __post_init__(self) -> None:
        if not self.clip_sample_range > 0.0:
            raise ConfigError(f"clip_sample_range is {self.clip_sample_range}; it must be above 0")
        if not 0.0 <= self.dynamic_thresholding_ratio <= 1.0:
            raise ConfigError(
                f"dynamic_thresholding_ratio is {self.dynamic_thresholding_ratio}; it must be in 0..1"
            )
        if not self.sample_max_value >= 1.0:
            raise ConfigError(f"sample_max_value is {self.sample_max_value}; it must be at least 1")

    def __call__(self, x0: Tensor) -> Tensor:
        """Apply the bounds to x0 [B, C, H, W]; without any, return x0 itself."""
        if self.thresholding:
            return self._threshold(x0)
        if self.clip_sample:
            return x0.clamp(-self.clip_sample_range, self.clip_sample_range)
        return x0

    def _threshold(self, x0: Tensor) -> Tensor:
        magnitudes = x0.flatten(1).abs().float()
        bound = torch.quantile(magnitudes, self.dynamic_thresholding_ratio, dim=1)
        bound = bound.clamp(1.0, self.sample_max_value).to(x0.dtype).view(-1, *[1] * (x0.ndim - 1))
        return x0.clamp(-bound, bound) / bound
