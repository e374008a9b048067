"""Noise levels and the noise schedule of diffusion models: how much noise there is at each timestep.

Noisy data is ``x = alpha * x0 + sigma * noise``. Diffusion preserves the variance, ``alpha = sqrt(alphas_cumprod)``
and ``sigma = sqrt(1 - alphas_cumprod)``; flow matching goes straight from noise to data, ``alpha = 1 - sigma``.
``sigma_ve`` is ``sigma / alpha``, the noise level of the variance-exploding form. All of it is computed in float64,
before a run begins.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from latentgen.errors import ConfigError, InputError

BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2"]
Spacing = Literal["linspace", "leading", "trailing"]
FloatArray = NDArray[np.floating]

MAX_TRAIN_TIMESTEPS = 100_000
# Replaces an alphas_cumprod of zero where a finite sigma_ve is needed (sigma_ve = 4096).
_ZERO_SNR_FLOOR = 2.0**-24


class NoiseLevel(NamedTuple):
    """One point of a run: ``x = alpha * x0 + sigma * noise``.

    alpha and sigma lie in 0..1, on a NoiseSchedule with ``alpha**2 + sigma**2 == 1``, on a FlowSchedule with
    ``alpha + sigma == 1``. timestep is the input of the network, not always whole: 0..num_train_timesteps - 1, on a
    FlowSchedule 0..num_train_timesteps.
    """

    alpha: float
    sigma: float
    timestep: float

    @classmethod
    def from_sigma_ve(cls, sigma_ve: float, timestep: float) -> NoiseLevel:
        """The variance preserving level whose noise-to-signal ratio ``sigma / alpha`` is `sigma_ve`."""
        alpha = 1.0 / math.hypot(1.0, sigma_ve)
        return cls(alpha, sigma_ve * alpha, timestep)

    @property
    def log_snr(self) -> float:
        """``lambda = log(alpha / sigma)``, half the log signal-to-noise ratio; infinite at either end."""
        if self.sigma == 0.0:
            return math.inf
        return math.log(self.alpha / self.sigma) if self.alpha > 0.0 else -math.inf


class BatchNoiseLevel(NamedTuple):
    """One noise level per sample, for training: alpha and sigma are [B, 1, 1, 1] float32, timestep is [B]."""

    alpha: Tensor
    sigma: Tensor
    timestep: Tensor


CLEAN = NoiseLevel(1.0, 0.0, 0.0)


@dataclass(frozen=True)
class NoiseSchedule:
    """The noise schedule that a model was trained with.

    Fields are named as in ``scheduler_config.json``. `linear` and `scaled_linear` run from beta_start to
    beta_end (the latter linearly in the square root); `squaredcos_cap_v2` is the cosine schedule (arXiv
    2102.09672, eq. 17) with betas capped at 0.999; trained_betas, one per timestep, replace all of these.
    rescale_betas_zero_snr shifts the schedule so that the last timestep is pure noise (arXiv 2305.08891,
    algorithm 1).

    Raises ConfigError for values outside their bounds.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: BetaSchedule = "linear"
    trained_betas: tuple[float, ...] | None = None
    rescale_betas_zero_snr: bool = False

    def __post_init__(self) -> None:
        check_train_timesteps(self.num_train_timesteps)
        if not 0.0 < self.beta_start <= self.beta_end < 1.0:
            raise ConfigError(
                f"beta_start is {self.beta_start}, beta_end {self.beta_end}; required is 0 < beta_start <= beta_end < 1"
            )
        if self.beta_schedule not in get_args(BetaSchedule):
            allowed = ", ".join(get_args(BetaSchedule))
            raise ConfigError(f"beta_schedule is {self.beta_schedule!r}; implemented are {allowed}")
        if self.trained_betas is not None:
            self._check_trained_betas(self.trained_betas)

    def _check_trained_betas(self, betas: tuple[float, ...]) -> None:
        if len(betas) != self.num_train_timesteps:
            raise ConfigError(
                f"trained_betas has {len(betas)} values, but num_train_timesteps is {self.num_train_timesteps}"
            )
        last = len(betas) - 1
        for index, beta in enumerate(betas):
            if not (0.0 < beta < 1.0 or (index == last and beta == 1.0)):
                raise ConfigError(
                    f"trained_betas[{index}] is {beta}; a beta must lie between 0 and 1 (the last may be 1)"
                )

    def _betas(self) -> FloatArray:
        count = self.num_train_timesteps
        if self.trained_betas is not None:
            return np.array(self.trained_betas)
        if self.beta_schedule == "linear":
            return np.linspace(self.beta_start, self.beta_end, count)
        if self.beta_schedule == "scaled_linear":
            return np.linspace(math.sqrt(self.beta_start), math.sqrt(self.beta_end), count) ** 2
        edges = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * math.pi / 2) ** 2
        return np.minimum(1.0 - edges[1:] / edges[:-1], 0.999)

    @cached_property
    def alphas_cumprod(self) -> FloatArray:
        """The remaining fraction of the signal's variance at each timestep, [num_train_timesteps] float64, falling.

        Betas and products are rounded to float32, as in training; otherwise sigma near timestep 0 would differ by up to
        1.5e-4 of its value.
        """
        alphas = np.float32(1.0) - self._betas().astype(np.float32)
        alphas_cumprod = np.cumprod(alphas, dtype=np.float64).astype(np.float32)
        if self.rescale_betas_zero_snr:
            alpha = np.sqrt(alphas_cumprod)
            alphas_cumprod = ((alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))) ** 2
        alphas_cumprod = alphas_cumprod.astype(np.float64)
        alphas_cumprod.setflags(write=False)
        return alphas_cumprod

    @cached_property
    def sigmas_ve(self) -> FloatArray:
        """``sigma / alpha`` at each timestep, [num_train_timesteps], rising; 4096, as in diffusers, at pure noise."""
        alphas_cumprod = np.where(self.alphas_cumprod > 0.0, self.alphas_cumprod, _ZERO_SNR_FLOOR)
        return np.sqrt((1.0 - alphas_cumprod) / alphas_cumprod)

    @property
    def _tables(self) -> tuple[Tensor, Tensor]:
        # Not cached: tensors made within FakeTensorMode cannot be used outside of it.
        alpha = torch.from_numpy(np.sqrt(self.alphas_cumprod)).float()
        return alpha, torch.from_numpy(np.sqrt(1.0 - self.alphas_cumprod)).float()

    def level(self, timestep: int) -> NoiseLevel:
        """The noise level at a whole timestep. Raises InputError outside 0..num_train_timesteps - 1."""
        if not 0 <= timestep < self.num_train_timesteps:
            last = self.num_train_timesteps - 1
            raise InputError(f"timestep {timestep} is outside the schedule's 0..{last}")
        alphas_cumprod = float(self.alphas_cumprod[timestep])
        return NoiseLevel(math.sqrt(alphas_cumprod), math.sqrt(1.0 - alphas_cumprod), float(timestep))

    def batch(self, timesteps: Tensor) -> BatchNoiseLevel:
        """The noise levels at timesteps [B] (whole numbers), for training, on the device of `timesteps`.

        alpha and sigma are [B, 1, 1, 1] float32.
        """
        shape = (-1, 1, 1, 1)
        alpha, sigma = (table.to(timesteps.device)[timesteps].view(shape) for table in self._tables)
        return BatchNoiseLevel(alpha, sigma, timesteps)

    def level_at_sigma_ve(self, sigma_ve: float) -> NoiseLevel:
        """The noise level whose ``sigma / alpha`` is `sigma_ve`, also between whole timesteps."""
        return NoiseLevel.from_sigma_ve(sigma_ve, float(self.timestep_at(np.array(sigma_ve))))

    def cutoff(self, share: float) -> float:
        """The lowest timestep in the first `share` (0..1) of the schedule, rounded as in diffusers."""
        return float(round(self.num_train_timesteps - share * self.num_train_timesteps))

    def sigma_ve_at(self, timesteps: FloatArray) -> FloatArray:
        """sigma_ve at timesteps, whole or not, interpolated linearly."""
        return np.interp(timesteps, np.arange(self.num_train_timesteps), self.sigmas_ve)

    def timestep_at(self, sigmas_ve: FloatArray) -> FloatArray:
        """The timesteps, not always whole, at which sigma_ve is `sigmas_ve`: linear in its logarithm."""
        return np.interp(np.log(sigmas_ve), np.log(self.sigmas_ve), np.arange(self.num_train_timesteps))

    def truncated_timestep_at(self, sigmas_ve: FloatArray) -> FloatArray:
        """The whole timesteps at or below those of `timestep_at`, as diffusers truncates them.

        diffusers compares with a logarithm in float32, whose rounding can miss the last timestep: with the schedule of
        Stable Diffusion, the network receives 998 there. With other schedules, the result may differ from diffusers'.
        """
        last_sigma = self.sigmas_ve[-1].astype(np.float32)
        last = self.num_train_timesteps - 1 - int(math.log(last_sigma) < float(np.log(last_sigma)))
        # Values that are whole up to rounding in float64 stay.
        return np.minimum(np.floor(self.timestep_at(sigmas_ve) + 1e-6), last)


def check_train_timesteps(num_train_timesteps: int) -> None:
    if not 2 <= num_train_timesteps <= MAX_TRAIN_TIMESTEPS:
        raise ConfigError(
            f"num_train_timesteps is {num_train_timesteps}; it must lie in 2..{MAX_TRAIN_TIMESTEPS}"
        )
