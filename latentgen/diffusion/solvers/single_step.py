"""Solvers that keep no history, and what all solvers share: a step from one noise level to the next.

A step is a pure function of the evaluation where it begins and the level where it ends.

One step covers a family. With ``u = eta * (sigma' / sigma) * sqrt(1 - alpha**2 / alpha'**2)``,

    x' = alpha' * x0 + sqrt(sigma'**2 - u**2) * noise_hat + u * z,    noise_hat = (x - alpha * x0) / sigma

is DDIM for any eta (arXiv 2010.02502, eq. 12 and 16), DDPM with its small variance (arXiv 2006.11239, eq. 6
and 7) and Euler ancestral at eta 1, Euler (arXiv 2206.00364, algorithm 1) and flow matching's Euler (arXiv
2209.03003) at eta 0: they differ in their noise levels, not in the step. LCM and TCD are this step with another
u. All others are the same step along an x0 (or noise) combined from several evaluations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from latentgen.diffusion.flow_matching import Schedule
from latentgen.diffusion.prediction import PredictionType, from_x0, to_x0
from latentgen.diffusion.schedule import NoiseLevel


@dataclass(frozen=True)
class Evaluation:
    """The network's prediction at one noise level: x and x0 are [B, C, H, W]; prediction_type is its output's."""

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
        """The raw output of the network, [B, C, H, W]."""
        if self.prediction_type == "epsilon":
            return self.noise
        return from_x0(self.x0, self.x, self.level, self.prediction_type)

    def with_x0(self, x0: Tensor) -> Evaluation:
        """The same evaluation with another predicted x0."""
        return replace(self, x0=x0)

    def with_noise(self, noise: Tensor) -> Evaluation:
        """The same evaluation with another predicted noise."""
        return self.with_x0(to_x0(noise, self.x, self.level, "epsilon"))


# The stochasticity of TCD, 0..1: the paper's best value for few steps.
TCD_GAMMA = 0.3

_SIGMA_DATA = 0.5

# Earlier evaluations of a run, the latest first: the only state of a multistep solver.
History = tuple[Evaluation, ...]


class StepInputs(NamedTuple):
    """The inputs of a step besides its evaluation and its target.

    index: of the step in the whole run, from 0.
    history: earlier evaluations, as many as the solver's `memory`, fewer at the beginning of a run.
    order: the highest order of the step, which falls towards the end of some runs.
    is_last: the target is the final level, where the network is not evaluated.
    evaluate: runs the network again, for any x at the target or at the solver's midpoint.
    draw: returns fresh standard normal noise, shaped like x.
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


# The evaluation at the start of the step, the level at its end, other inputs -> x at that level.
SolverStep = Callable[[Evaluation, NoiseLevel, StepInputs], Tensor]


def fresh_noise_scale(level: NoiseLevel, target: NoiseLevel, eta: float) -> float:
    """The standard deviation u of the fresh noise in a step from level to target; 0 for eta 0."""
    remaining = max(0.0, 1.0 - (level.alpha / target.alpha) ** 2)
    return eta * (target.sigma / level.sigma) * math.sqrt(remaining)


def first_order_step(
    now: Evaluation, target: NoiseLevel, fresh: float = 0.0, noise: Tensor | None = None
) -> Tensor:
    """``x' = alpha' * x0 + sqrt(sigma'**2 - fresh**2) * noise_hat + fresh * noise``; finite at zero terminal SNR.

    noise is standard normal, [B, C, H, W], and scaled to the standard deviation `fresh`.
    """
    level = now.level
    keep = math.sqrt(max(0.0, target.sigma**2 - fresh**2)) / level.sigma
    moved = (keep * now.x).add_(now.x0, alpha=target.alpha - level.alpha * keep)
    return moved if noise is None or fresh == 0.0 else moved.add_(noise, alpha=fresh)


def step_along_noise(now: Evaluation, target: NoiseLevel, noise: Tensor) -> Tensor:
    """The deterministic step for another predicted noise [B, C, H, W]."""
    level = now.level
    scale = target.alpha / level.alpha
    return (scale * now.x).add_(noise, alpha=target.sigma - scale * level.sigma)


def step_along_output(now: Evaluation, target: NoiseLevel, output: Tensor) -> Tensor:
    """The deterministic step for another output of the network, [B, C, H, W]."""
    if now.prediction_type == "epsilon":
        return step_along_noise(now, target, output)
    return first_order_step(now.with_x0(to_x0(output, now.x, now.level, now.prediction_type)), target)


def ancestral_step(now: Evaluation, target: NoiseLevel, noise: Tensor | None) -> Tensor:
    """The step at eta 1, with the fresh noise of the exact posterior given x0."""
    return first_order_step(now, target, fresh_noise_scale(now.level, target, eta=1.0), noise)


def weighted_sum(weights: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    """The sum of tensors of one shape, each times its weight."""
    total = weights[0] * tensors[0]
    for weight, tensor in zip(weights[1:], tensors[1:], strict=True):
        total.add_(tensor, alpha=weight)
    return total


def euler_step(now: Evaluation, target: NoiseLevel, inputs: StepInputs) -> Tensor:
    """DDIM at eta 0 (arXiv 2010.02502, eq. 12), Euler (arXiv 2206.00364, algorithm 1) and flow matching's Euler."""
    return first_order_step(now, target)


def ddpm_step(now: Evaluation, target: NoiseLevel, inputs: StepInputs) -> Tensor:
    """DDPM (arXiv 2006.11239, algorithm 2), without noise at timestep 0."""
    return ancestral_step(now, target, inputs.draw() if now.level.timestep > 0.0 else None)


def euler_ancestral_step(now: Evaluation, target: NoiseLevel, inputs: StepInputs) -> Tensor:
    """Euler ancestral; draws noise even in the last step, as the references do, where its scale is 0."""
    return ancestral_step(now, target, inputs.draw())


def lcm_step(now: Evaluation, target: NoiseLevel, inputs: StepInputs) -> Tensor:
    """Latent consistency models (arXiv 2310.04378): to x0, then back to the target with only fresh noise.

    A skip connection with sigma_data 0.5 makes x0 equal to x at timestep 0.
    """
    scaled = now.level.timestep * inputs.timestep_scaling
    skip = _SIGMA_DATA**2 / (scaled**2 + _SIGMA_DATA**2)
    x0 = torch.add(skip * now.x, now.x0, alpha=math.sqrt(1.0 - skip))
    noise = None if inputs.is_last else inputs.draw()
    return first_order_step(now.with_x0(x0), target, target.sigma, noise)


def tcd_step(now: Evaluation, target: NoiseLevel, inputs: StepInputs) -> Tensor:
    """Trajectory consistency distillation (arXiv 2402.19159): to (1 - gamma) of the target's timestep, and back up."""
    below = inputs.schedule.level(int((1.0 - TCD_GAMMA) * target.timestep))
    fresh = math.sqrt(1.0 - (target.alpha / below.alpha) ** 2)
    return first_order_step(now, target, fresh, None if inputs.is_last else inputs.draw())


def heun_step(now: Evaluation, target: NoiseLevel, inputs: StepInputs) -> Tensor:
    """Heun's method (arXiv 2206.00364, algorithm 1): along the mean of the noise at both ends."""
    guess = first_order_step(now, target)
    if inputs.is_last:
        return guess
    ahead = inputs.evaluate(guess, target)
    return step_along_noise(now, target, (now.noise + ahead.noise) / 2)


def dpm2_step(now: Evaluation, target: NoiseLevel, inputs: StepInputs) -> Tensor:
    """DPM-Solver-2 (arXiv 2206.00927, algorithm 1): along the noise half way, in log sigma_ve."""
    if inputs.is_last:
        return first_order_step(now, target)
    middle = middle_in_log_sigma(now.level, target, inputs.schedule)
    halfway = inputs.evaluate(first_order_step(now, middle), middle)
    return step_along_noise(now, target, halfway.noise)


def dpm2_ancestral_step(now: Evaluation, target: NoiseLevel, inputs: StepInputs) -> Tensor:
    """DPM-Solver-2 to below the target, then back up with fresh noise; the midpoint is the target itself."""
    if inputs.is_last:
        return first_order_step(now, target)
    middle = same_sigma(now.level, target, inputs.schedule)
    halfway = inputs.evaluate(first_order_step(now, middle), middle)
    return ancestral_step(now.with_noise(halfway.noise), target, inputs.draw())


def dpmpp_sde_step(now: Evaluation, target: NoiseLevel, inputs: StepInputs) -> Tensor:
    """SDE-DPM-Solver++ of one step (arXiv 2211.01095): along the x0 half way, in log sigma_ve, at eta 1.

    The noise up to the midpoint is part of that of the whole step: one Brownian motion in sigma_ve.
    """
    if inputs.is_last:
        return first_order_step(now, target)
    middle = middle_in_log_sigma(now.level, target, inputs.schedule)
    noise = inputs.draw()
    halfway = inputs.evaluate(ancestral_step(now, middle, noise), middle)
    start, half, end = (level.sigma / level.alpha for level in (now.level, middle, target))
    share = (start - half) / (start - end)
    noise = weighted_sum((math.sqrt(share), math.sqrt(1.0 - share)), (noise, inputs.draw()))
    return ancestral_step(now.with_x0(halfway.x0), target, noise)


def middle_in_log_sigma(level: NoiseLevel, target: NoiseLevel, schedule: Schedule) -> NoiseLevel:
    """The level whose sigma_ve is the geometric mean of two others', at the timestep that has it."""
    return schedule.level_at_sigma_ve(math.exp(-(level.log_snr + target.log_snr) / 2))


def same_sigma(level: NoiseLevel, target: NoiseLevel, schedule: Schedule) -> NoiseLevel:
    """The target with the timestep of its sigma_ve, which may differ from its own timestep, if that was rounded."""
    return schedule.level_at_sigma_ve(target.sigma / target.alpha)
