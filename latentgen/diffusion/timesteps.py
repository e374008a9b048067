"""Where a run looks: the noise levels that a solver visits, spaced over a schedule or laid out by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from latentgen.diffusion.schedule import (
    CLEAN,
    FloatArray,
    FlowSchedule,
    NoiseLevel,
    NoiseSchedule,
    Spacing,
    distilled_timesteps,
    spaced_timesteps,
)
from latentgen.diffusion.sigmas import sigmas_between, spaced_sigmas
from latentgen.diffusion.solver_names import Sigmas, SolverName
from latentgen.diffusion.solvers.table import SOLVERS, Solver
from latentgen.errors import InputError
from latentgen.files import quote

# The most values of a list by hand.
_MAX_LEVELS = 1001


class Layout(Protocol):
    """The noise levels of a run, falling, and the level where it ends; all raise InputError for what does not fit."""

    def spaced(self, num_steps: int) -> tuple[NoiseLevel, ...]:
        """Of `num_steps` steps."""
        ...

    def at_timesteps(self, timesteps: Sequence[float]) -> tuple[NoiseLevel, ...]:
        """At timesteps by hand, falling."""
        ...

    def at_sigmas(self, sigmas: Sequence[float]) -> tuple[NoiseLevel, ...]:
        """At noise levels by hand, falling."""
        ...


@dataclass(frozen=True)
class DiffusionTimesteps:
    """Runs over a NoiseSchedule. `end` is where they end; the other fields are those of the Scheduler."""

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
        """Of `num_steps` steps, spread by the spacing, the sigmas or the distillation."""
        timesteps = self._timesteps(num_steps)
        if self._solver.whole_timesteps == "always":
            timesteps = np.round(timesteps)
        levels = self._in_sigma_ve(timesteps) if self._solver.in_sigma_ve else self._whole(timesteps)
        return (*levels, self.end)

    def at_timesteps(self, timesteps: Sequence[float]) -> tuple[NoiseLevel, ...]:
        """At timesteps by hand, whole ones for the solvers that know no others."""
        numbers = _falling("timesteps", timesteps, self.schedule.num_train_timesteps - 1)
        solver = self._solver
        if (solver.whole_timesteps == "always" or not solver.in_sigma_ve) and (numbers % 1.0).any():
            raise InputError(f"timesteps must be whole numbers for the solver {self.solver_name}")
        if solver.in_sigma_ve:
            return (*_levels(self.schedule.sigma_ve_at(numbers), numbers), self.end)
        return (*self._whole(numbers), self.end)

    def at_sigmas(self, sigmas: Sequence[float]) -> tuple[NoiseLevel, ...]:
        """At values of sigma_ve by hand; the last is where the run ends, and 0 stands for its usual end."""
        if not self._solver.in_sigma_ve:
            raise InputError(
                f"the solver {self.solver_name} has no levels between whole timesteps; give timesteps, not sigmas"
            )
        # Lists are published with few digits, whose rounding may lead a little beyond the schedule.
        numbers = _falling("sigmas", sigmas, float(self.schedule.sigmas_ve[-1]), slack=1.001)
        if len(numbers) < 2:
            raise InputError("sigmas needs at least two values, where the run begins and where it ends")
        timesteps = self._told(None, np.maximum(numbers, self.schedule.sigmas_ve[0]))
        *levels, end = _levels(numbers, timesteps)
        return (*levels, end if end.sigma > 0.0 else self.end)

    def _timesteps(self, num_steps: int) -> FloatArray:
        train = self.schedule.num_train_timesteps
        if self._solver.distilled:
            return distilled_timesteps(train, self.original_inference_steps, num_steps)
        return spaced_timesteps(
            self.spacing,
            train,
            num_steps,
            steps_offset=self.steps_offset,
            open_end=self._solver.open_end,
        )

    def _whole(self, timesteps: FloatArray) -> list[NoiseLevel]:
        return [self.schedule.level(int(timestep)) for timestep in timesteps]

    def _in_sigma_ve(self, timesteps: FloatArray) -> list[NoiseLevel]:
        sigmas_ve = self.schedule.sigma_ve_at(timesteps)
        if self.sigmas:
            # They reach from end to end: of the whole schedule where the spacing has an open end.
            ends = self.schedule.sigmas_ve if self._solver.open_end else sigmas_ve[::-1]
            sigmas_ve = spaced_sigmas(
                self.sigmas, self.schedule, float(ends[0]), float(ends[-1]), len(timesteps)
            )
            timesteps = self._told(self.sigmas, sigmas_ve)
        return _levels(sigmas_ve, timesteps)

    def _told(self, sigmas: Sigmas | None, sigmas_ve: FloatArray) -> FloatArray:
        """The timesteps that the network is told: whole ones come about as in diffusers."""
        timesteps = self.schedule.timestep_at(sigmas_ve)
        if self._solver.whole_timesteps == "always":
            cosine = self.schedule.beta_schedule == "squaredcos_cap_v2"
            truncates = sigmas in ("exponential", "beta") or (cosine and sigmas == "karras")
            return self.schedule.truncated_timestep_at(sigmas_ve) if truncates else np.round(timesteps)
        rounds = self._solver.whole_timesteps == "karras" and sigmas == "karras"
        return np.round(timesteps) if rounds else timesteps


@dataclass(frozen=True)
class FlowTimesteps:
    """Runs over a FlowSchedule, which end in clean data."""

    schedule: FlowSchedule
    sigmas: Sigmas | None

    def spaced(self, num_steps: int) -> tuple[NoiseLevel, ...]:
        """Of `num_steps` steps, even in sigma before the shift."""
        train = self.schedule.num_train_timesteps
        if not 1 <= num_steps <= train:
            raise InputError(f"the number of steps is {num_steps}; this scheduler allows 1..{train}")
        # As in diffusers the lowest is that of the shifted schedule, and is shifted again.
        lowest = float(self.schedule.shifted(np.array(1.0 / train)))
        sigmas = self.schedule.shifted(np.linspace(1.0, lowest, num_steps))
        match self.sigmas:
            case "karras" | "exponential" | "beta" as spacing:
                sigmas = sigmas_between(spacing, float(sigmas[-1]), float(sigmas[0]), num_steps)
        return self._over(train * sigmas)

    def at_timesteps(self, timesteps: Sequence[float]) -> tuple[NoiseLevel, ...]:
        """At timesteps by hand, at which the network is told them; no shift moves them."""
        return self._over(_falling("timesteps", timesteps, self.schedule.num_train_timesteps))

    def at_sigmas(self, sigmas: Sequence[float]) -> tuple[NoiseLevel, ...]:
        """At values of sigma by hand, as they are before the shift; the end, 0, need not be among them."""
        numbers = self.schedule.shifted(_falling("sigmas", sigmas, 1.0))
        return self._over(self.schedule.num_train_timesteps * numbers)

    def _over(self, timesteps: FloatArray) -> tuple[NoiseLevel, ...]:
        noisy = timesteps[timesteps > 0.0]
        if not len(noisy):
            raise InputError("a run by hand needs a level above 0, where it begins")
        # What is pure noise but for float64's rounding is pure noise.
        held = np.minimum(noisy, self.schedule.num_train_timesteps)
        return (*(self.schedule.level(float(timestep)) for timestep in held), CLEAN)


def _levels(sigmas_ve: FloatArray, timesteps: FloatArray) -> list[NoiseLevel]:
    return [
        NoiseLevel.from_sigma_ve(float(sigma_ve), float(timestep))
        for sigma_ve, timestep in zip(sigmas_ve, timesteps, strict=True)
    ]


def _falling(name: str, values: Sequence[float], most: float, slack: float = 1.0) -> FloatArray:
    """Numbers from 0 to `most`, each less than the one before; InputError where they are anything else."""
    try:
        numbers = np.array([float(value) for value in values])
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"{name} must be a list of numbers, not {quote(values)}") from None
    if not 1 <= len(numbers) <= _MAX_LEVELS:
        raise InputError(f"{name} has {len(numbers)} entries; it needs 1..{_MAX_LEVELS}")
    outside = ~((numbers >= 0.0) & (numbers <= most * slack))
    if outside.any():
        raise InputError(
            f"{name}[{outside.argmax()}] is {numbers[outside.argmax()]:g}; the schedule has 0..{most:g}"
        )
    rises = np.diff(numbers) >= 0.0
    if rises.any():
        index = int(rises.argmax())
        raise InputError(
            f"{name} must fall, but {numbers[index + 1]:g} follows {numbers[index]:g} at [{index + 1}]"
        )
    return numbers
