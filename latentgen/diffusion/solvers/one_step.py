"""Samplers whose step asks the network once and remembers nothing."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from latentgen.diffusion.schedule import NoiseLevel
from latentgen.diffusion.solvers.step import Evaluation, StepInputs, ancestral_step, first_order_step

# How much of the noise that TCD ends up with is fresh: what its paper finds best for few steps, of 0..1.
TCD_GAMMA = 0.3

_SIGMA_DATA = 0.5


def deterministic_step(now: Evaluation, target: NoiseLevel, inputs: StepInputs) -> Tensor:
    """DDIM at eta 0, and Euler."""
    return first_order_step(now, target)


def ddpm_step(now: Evaluation, target: NoiseLevel, inputs: StepInputs) -> Tensor:
    """DDPM, which draws nothing at timestep 0."""
    return ancestral_step(now, target, inputs.draw() if now.level.timestep > 0.0 else None)


def euler_ancestral_step(now: Evaluation, target: NoiseLevel, inputs: StepInputs) -> Tensor:
    """Euler ancestral, which draws even where it ends in clean data and has no use for it."""
    return ancestral_step(now, target, inputs.draw())


def lcm_step(now: Evaluation, target: NoiseLevel, inputs: StepInputs) -> Tensor:
    """Latent consistency models (arXiv 2310.04378): to x0 at once, and back up with nothing but fresh noise.

    A skip connection makes x0 of x at timestep 0; its sigma_data is 0.5.
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
