"""Samplers whose step asks the network twice: where it begins, and ahead of it."""

from __future__ import annotations

import math

from torch import Tensor

from latentgen.diffusion.schedule import NoiseLevel, Schedule
from latentgen.diffusion.solvers.step import (
    Evaluation,
    StepInputs,
    ancestral_step,
    first_order_step,
    step_along_noise,
    weighted_sum,
)


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
    """DPM-Solver-2 to below the target, and back up with fresh noise: half way down lies the target itself."""
    if inputs.is_last:
        return first_order_step(now, target)
    middle = same_sigma(now.level, target, inputs.schedule)
    halfway = inputs.evaluate(first_order_step(now, middle), middle)
    return ancestral_step(now.with_noise(halfway.noise), target, inputs.draw())


def dpmpp_sde_step(now: Evaluation, target: NoiseLevel, inputs: StepInputs) -> Tensor:
    """SDE-DPM-Solver++ of one step (arXiv 2211.01095): along the x0 half way, in log sigma_ve, at eta 1.

    The noise on the way there is the beginning of that of the whole step: they are one Brownian motion in sigma_ve.
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
    """The target, at the timestep that has its sigma_ve: not quite its own where that was rounded."""
    return schedule.level_at_sigma_ve(target.sigma / target.alpha)
