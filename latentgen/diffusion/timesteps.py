"""The timesteps and noise levels of a run: spaced over the schedule, or custom timesteps or sigmas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from latentgen.diffusion.schedule import FloatArray, NoiseLevel, NoiseSchedule, Spacing
from latentgen.diffusion.sigmas import falling_numbers, spaced_sigmas
from latentgen.diffusion.solver_names import Sigmas, SolverName
from latentgen.diffusion.solvers.table import SOLVERS, Solver
from latentgen.errors import ConfigError, InputError


@dataclass(frozen=True)
class DiffusionTimesteps:
    """Timesteps on a NoiseSchedule; `end` is the final level, the other fields are those of the Scheduler."""

    schedule: NoiseSchedule
    solver_name: SolverName
    spacing: Spacing
    steps_offset: int
    sigmas: Sigmas | None
    original_inference_steps: int
    end: NoiseLevel

    @property
    def _solver(self) -> Solver:
        return SOLVERS[self.solver_name]

    def spaced(self, num_steps: int) -> tuple[NoiseLevel, ...]:
        """The levels of `num_steps` steps by the spacing, the sigmas or the distillation, and the final level."""
        timesteps = self._timesteps(num_steps)
        if self._solver.whole_timesteps == "always":
            timesteps = np.round(timesteps)
        levels = self._in_sigma_ve(timesteps) if self._solver.in_sigma_ve else self._levels_at(timesteps)
        return (*levels, self.end)

    def at_timesteps(self, timesteps: Sequence[float]) -> tuple[NoiseLevel, ...]:
        """The levels at custom, falling timesteps, which must be whole unless the solver works in sigma_ve."""
        numbers = falling_numbers("timesteps", timesteps, self.schedule.num_train_timesteps - 1)
        solver = self._solver
        if (solver.whole_timesteps == "always" or not solver.in_sigma_ve) and (numbers % 1.0).any():
            raise InputError(f"timesteps must be whole numbers for the solver {self.solver_name}")
        if solver.in_sigma_ve:
            return (*_levels(self.schedule.sigma_ve_at(numbers), numbers), self.end)
        return (*self._levels_at(numbers), self.end)

    def at_sigmas(self, sigmas: Sequence[float]) -> tuple[NoiseLevel, ...]:
        """The levels at custom, falling values of sigma_ve; the last is the final level, 0 for the usual one."""
        if not self._solver.in_sigma_ve:
            raise InputError(f"the solver {self.solver_name} supports timesteps, not sigmas")
        # Published lists have few digits, so rounding may exceed the schedule by a little.
        numbers = falling_numbers("sigmas", sigmas, float(self.schedule.sigmas_ve[-1]), slack=1.001)
        if len(numbers) < 2:
            raise InputError("sigmas needs at least two values, the first level and the final one")
        timesteps = self._network_timesteps(None, np.maximum(numbers, self.schedule.sigmas_ve[0]))
        *levels, end = _levels(numbers, timesteps)
        return (*levels, end if end.sigma > 0.0 else self.end)

    def _timesteps(self, num_steps: int) -> FloatArray:
        train = self.schedule.num_train_timesteps
        if self._solver.distilled:
            return distilled_timesteps(train, self.original_inference_steps, num_steps)
        return spaced_timesteps(
            self.spacing, train, num_steps, steps_offset=self.steps_offset, open_end=self._solver.open_end
        )

    def _levels_at(self, timesteps: FloatArray) -> list[NoiseLevel]:
        return [self.schedule.level(int(timestep)) for timestep in timesteps]

    def _in_sigma_ve(self, timesteps: FloatArray) -> list[NoiseLevel]:
        sigmas_ve = self.schedule.sigma_ve_at(timesteps)
        if self.sigmas:
            # The ends are those of the whole schedule where the spacing has an open end.
            ends = self.schedule.sigmas_ve if self._solver.open_end else sigmas_ve[::-1]
            sigmas_ve = spaced_sigmas(
                self.sigmas, self.schedule, float(ends[0]), float(ends[-1]), len(timesteps)
            )
            timesteps = self._network_timesteps(self.sigmas, sigmas_ve)
        return _levels(sigmas_ve, timesteps)

    def _network_timesteps(self, sigmas: Sigmas | None, sigmas_ve: FloatArray) -> FloatArray:
        """The timesteps that the network receives, rounded as diffusers rounds them."""
        timesteps = self.schedule.timestep_at(sigmas_ve)
        if self._solver.whole_timesteps == "always":
            cosine = self.schedule.beta_schedule == "squaredcos_cap_v2"
            truncates = sigmas in ("exponential", "beta") or (cosine and sigmas == "karras")
            return self.schedule.truncated_timestep_at(sigmas_ve) if truncates else np.round(timesteps)
        rounds = self._solver.whole_timesteps == "karras" and sigmas == "karras"
        return np.round(timesteps) if rounds else timesteps


def _levels(sigmas_ve: FloatArray, timesteps: FloatArray) -> list[NoiseLevel]:
    return [
        NoiseLevel.from_sigma_ve(float(sigma_ve), float(timestep))
        for sigma_ve, timestep in zip(sigmas_ve, timesteps, strict=True)
    ]


def spaced_timesteps(
    spacing: Spacing,
    num_train_timesteps: int,
    num_steps: int,
    *,
    steps_offset: int = 0,
    open_end: bool = False,
) -> FloatArray:
    """`num_steps` timesteps, falling, spread over the schedule (arXiv 2305.08891, table 2).

    `linspace` includes both ends and is not rounded; `leading` counts up from steps_offset in whole strides;
    `trailing` counts down from the last timestep. With open_end the lowest point of `linspace` and `leading`, the final
    level, is left out.

    Raises InputError when the schedule has fewer steps.
    """
    last = num_train_timesteps - 1
    limit = last if open_end else num_train_timesteps
    if not 1 <= num_steps <= limit:
        raise InputError(f"the number of steps is {num_steps}; this scheduler allows 1..{limit}")
    points = num_steps + 1 if open_end else num_steps
    if spacing == "linspace":
        return np.linspace(0.0, last, points)[::-1][:num_steps]
    if spacing == "trailing":
        stride = num_train_timesteps / num_steps
        # arange may be one too long, because the stride is not exact; the rounding is that of the references.
        return np.round(np.arange(num_train_timesteps, 0, -stride)[:num_steps]) - 1.0
    timesteps = np.arange(points)[::-1][:num_steps] * (num_train_timesteps // points) + float(steps_offset)
    if timesteps[0] > last:
        raise InputError(
            f"{num_steps} steps with steps_offset {steps_offset} begin at timestep {timesteps[0]:.0f}, but "
            f"the schedule ends at {last}; use fewer steps"
        )
    return timesteps


def distilled_timesteps(
    num_train_timesteps: int, original_inference_steps: int, num_steps: int
) -> FloatArray:
    """`num_steps` timesteps, falling, of the original_inference_steps of a distillation.

    Those are the ends of whole strides of the schedule (arXiv 2310.04378, section 4.3), of which a run takes
    `num_steps`, evenly spread, the last first.

    Raises InputError when the distillation has fewer steps, ConfigError when the schedule has.
    """
    if original_inference_steps > num_train_timesteps:
        raise ConfigError(
            f"original_inference_steps is {original_inference_steps}; it must be at most the"
            f" num_train_timesteps {num_train_timesteps}"
        )
    if not 1 <= num_steps <= original_inference_steps:
        raise InputError(
            f"the number of steps is {num_steps}; a model distilled on {original_inference_steps} steps"
            f" (original_inference_steps) allows 1..{original_inference_steps}"
        )
    stride = num_train_timesteps // original_inference_steps
    skipped = np.arange(num_steps) * original_inference_steps // num_steps
    return (original_inference_steps - skipped) * stride - 1.0
