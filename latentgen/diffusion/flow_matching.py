"""Flow matching: its schedule, the straight path from noise to data, and the timesteps of a run on it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from latentgen.diffusion.schedule import (
    CLEAN,
    BatchNoiseLevel,
    FloatArray,
    NoiseLevel,
    NoiseSchedule,
    check_train_timesteps,
)
from latentgen.diffusion.sigmas import falling_numbers, sigmas_between
from latentgen.diffusion.solver_names import Sigmas
from latentgen.errors import ConfigError, InputError

# Far above any useful value; keeps the levels of a run distinct.
_MAX_SHIFT = 1000.0


@dataclass(frozen=True)
class FlowSchedule:
    """The straight path from noise to data that a flow-matching model was trained on.

    ``x = (1 - sigma) * x0 + sigma * noise`` (arXiv 2403.03206, eq. 13), and the network receives the timestep
    ``num_train_timesteps * sigma``. shift moves the levels of a run towards noise (above 1) or towards data (below 1),
    and larger images need a larger shift (arXiv 2403.03206, eq. 23).

    Raises ConfigError for values outside their bounds.
    """

    num_train_timesteps: int = 1000
    shift: float = 1.0

    def __post_init__(self) -> None:
        check_train_timesteps(self.num_train_timesteps)
        if not 1.0 / _MAX_SHIFT <= self.shift <= _MAX_SHIFT:
            raise ConfigError(f"shift is {self.shift}; it must lie in {1.0 / _MAX_SHIFT:g}..{_MAX_SHIFT:g}")

    def shifted(self, sigmas: FloatArray) -> FloatArray:
        """Apply the shift to values of sigma in 0..1; the results are in 0..1 too."""
        return self.shift * sigmas / (self.shift * sigmas + (1.0 - sigmas))

    def level(self, timestep: float) -> NoiseLevel:
        """The noise level at a timestep, whole or not. Raises InputError outside 0..num_train_timesteps."""
        if not 0.0 <= timestep <= self.num_train_timesteps:
            raise InputError(f"timestep {timestep:g} is outside the schedule's 0..{self.num_train_timesteps}")
        sigma = timestep / self.num_train_timesteps
        return NoiseLevel(1.0 - sigma, sigma, float(timestep))

    def batch(self, timesteps: Tensor) -> BatchNoiseLevel:
        """The noise levels at timesteps [B] in 0..num_train_timesteps, for training, on their device.

        alpha and sigma are [B, 1, 1, 1] float32. shift is not applied here, but when the timesteps are drawn.
        """
        sigma = (timesteps.float() / self.num_train_timesteps).view(-1, 1, 1, 1)
        return BatchNoiseLevel(1.0 - sigma, sigma, timesteps)

    def level_at_sigma_ve(self, sigma_ve: float) -> NoiseLevel:
        """The noise level whose ``sigma / alpha`` is `sigma_ve`."""
        return self.level(self.num_train_timesteps * sigma_ve / (1.0 + sigma_ve))

    def cutoff(self, share: float) -> float:
        """The lowest timestep in the first `share` (0..1) of the schedule; a share of 0 contains none."""
        return math.nextafter(self.num_train_timesteps - share * self.num_train_timesteps, math.inf)


Schedule = NoiseSchedule | FlowSchedule


@dataclass(frozen=True)
class FlowTimesteps:
    """Timesteps on a FlowSchedule; runs end in clean data."""

    schedule: FlowSchedule
    sigmas: Sigmas | None

    def spaced(self, num_steps: int) -> tuple[NoiseLevel, ...]:
        """The levels of `num_steps` steps, even in sigma before the shift, and the clean end."""
        train = self.schedule.num_train_timesteps
        if not 1 <= num_steps <= train:
            raise InputError(f"the number of steps is {num_steps}; this scheduler allows 1..{train}")
        # As in diffusers the lowest is that of the shifted schedule, and is shifted again.
        lowest = float(self.schedule.shifted(np.array(1.0 / train)))
        sigmas = self.schedule.shifted(np.linspace(1.0, lowest, num_steps))
        match self.sigmas:
            case "karras" | "exponential" | "beta" as spacing:
                sigmas = sigmas_between(spacing, float(sigmas[-1]), float(sigmas[0]), num_steps)
        return self._levels(train * sigmas)

    def at_timesteps(self, timesteps: Sequence[float]) -> tuple[NoiseLevel, ...]:
        """The levels at custom, falling timesteps, as the network receives them; the shift does not apply."""
        return self._levels(falling_numbers("timesteps", timesteps, self.schedule.num_train_timesteps))

    def at_sigmas(self, sigmas: Sequence[float]) -> tuple[NoiseLevel, ...]:
        """The levels at custom, falling values of sigma before the shift; the end, 0, may be left out."""
        numbers = self.schedule.shifted(falling_numbers("sigmas", sigmas, 1.0))
        return self._levels(self.schedule.num_train_timesteps * numbers)

    def _levels(self, timesteps: FloatArray) -> tuple[NoiseLevel, ...]:
        noisy = timesteps[timesteps > 0.0]
        if not len(noisy):
            raise InputError("custom timesteps or sigmas need at least one value above 0")
        # Rounding in float64 must not take a level beyond pure noise.
        clamped = np.minimum(noisy, self.schedule.num_train_timesteps)
        return (*(self.schedule.level(float(timestep)) for timestep in clamped), CLEAN)
