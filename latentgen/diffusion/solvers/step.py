"""What all samplers share: a step is a pure function from one noise level to the next.

One step covers a family. With ``u = eta * (sigma' / sigma) * sqrt(1 - alpha**2 / alpha'**2)``,

    x' = alpha' * x0 + sqrt(sigma'**2 - u**2) * noise_hat + u * z,    noise_hat = (x - alpha * x0) / sigma

is DDIM for any eta (arXiv 2010.02502, eq. 12 and 16), DDPM with its small variance (arXiv 2006.11239, eq. 6
and 7) and Euler ancestral at eta 1, Euler (arXiv 2206.00364, algorithm 1) at eta 0, that of flow matching (arXiv
2209.03003) too: they differ in the levels that they visit, not in the step. LCM and TCD are this step with a u of
their own. All others are it along an x0, or what is the same a noise, that is put together out of several evaluations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from latentgen.diffusion.prediction import PredictionType, from_x0, to_x0
from latentgen.diffusion.schedule import NoiseLevel, Schedule


@dataclass(frozen=True)
class Evaluation:
    """What the network said of x at one noise level: x and x0 are [B, C, H, W].

    prediction_type is the form in which it said so.
    """

    level: NoiseLevel
    x: Tensor
    x0: Tensor
    prediction_type: PredictionType

    @cached_property
    def noise(self) -> Tensor:
        """The noise that leads from x0 to x, [B, C, H, W]."""
        return torch.sub(self.x, self.x0, alpha=self.level.alpha).div_(self.level.sigma)

    @cached_property
    def output(self) -> Tensor:
        """What the network put out, [B, C, H, W]."""
        if self.prediction_type == "epsilon":
            return self.noise
        return from_x0(self.x0, self.x, self.level, self.prediction_type)

    def with_x0(self, x0: Tensor) -> Evaluation:
        """The evaluation that would have predicted this x0."""
        return replace(self, x0=x0)

    def with_noise(self, noise: Tensor) -> Evaluation:
        """The evaluation that would have found this noise in x."""
        return self.with_x0(to_x0(noise, self.x, self.level, "epsilon"))


# Earlier evaluations of a run, the latest first: the whole memory of a multistep solver.
History = tuple[Evaluation, ...]


class StepInputs(NamedTuple):
    """What a step may use besides where it stands and where it goes.

    index: of the step in the whole run, from 0.
    history: earlier evaluations, as many as the solver's `memory`, fewer where a run begins.
    order: the highest order that a step of the solver may have here; it falls towards the end of some runs.
    is_last: the run ends at the target; the network has no say there.
    evaluate: asks the network once more, of any x at the target or at the solver's level between.
    draw: gives fresh standard normal noise, shaped like x.
    schedule, timestep_scaling: of the Scheduler.
    """

    index: int
    history: History
    order: int
    is_last: bool
    evaluate: Callable[[Tensor, NoiseLevel], Evaluation]
    draw: Callable[[], Tensor]
    schedule: Schedule
    timestep_scaling: float


# The evaluation where the step begins, the level where it ends -> x at that level.
SolverStep = Callable[[Evaluation, NoiseLevel, StepInputs], Tensor]


def fresh_noise_scale(level: NoiseLevel, target: NoiseLevel, eta: float) -> float:
    """The standard deviation u of the fresh noise in a step from level to target; 0 for eta 0."""
    remaining = max(0.0, 1.0 - (level.alpha / target.alpha) ** 2)
    return eta * (target.sigma / level.sigma) * math.sqrt(remaining)


def first_order_step(
    now: Evaluation, target: NoiseLevel, fresh: float = 0.0, noise: Tensor | None = None
) -> Tensor:
    """One step to the target along the predicted x0; finite at zero signal-to-noise ratio.

    noise is standard normal, [B, C, H, W], and counts for its standard deviation `fresh`.
    """
    level = now.level
    keep = math.sqrt(max(0.0, target.sigma**2 - fresh**2)) / level.sigma
    moved = (keep * now.x).add_(now.x0, alpha=target.alpha - level.alpha * keep)
    return moved if noise is None or fresh == 0.0 else moved.add_(noise, alpha=fresh)


def step_along_noise(now: Evaluation, target: NoiseLevel, noise: Tensor) -> Tensor:
    """The same step without fresh noise, had another noise [B, C, H, W] been found in x."""
    level = now.level
    scale = target.alpha / level.alpha
    return (scale * now.x).add_(noise, alpha=target.sigma - scale * level.sigma)


def step_along_output(now: Evaluation, target: NoiseLevel, output: Tensor) -> Tensor:
    """The same step without fresh noise, had the network put out something else, [B, C, H, W]."""
    if now.prediction_type == "epsilon":
        return step_along_noise(now, target, output)
    return first_order_step(now.with_x0(to_x0(output, now.x, now.level, now.prediction_type)), target)


def ancestral_step(now: Evaluation, target: NoiseLevel, noise: Tensor | None) -> Tensor:
    """The same step at eta 1: as much fresh noise as leaves x distributed as it should be, were x0 known."""
    return first_order_step(now, target, fresh_noise_scale(now.level, target, eta=1.0), noise)


def weighted_sum(weights: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    """The sum of tensors of one shape, each times its weight."""
    total = weights[0] * tensors[0]
    for weight, tensor in zip(weights[1:], tensors[1:], strict=True):
        total.add_(tensor, alpha=weight)
    return total
