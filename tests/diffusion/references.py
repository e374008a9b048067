"""Runs of diffusers' schedulers and of ours over the same small denoising problem."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import diffusers
import mpmath
import numpy as np
import torch
from torch import Tensor

from latentgen.diffusion.guidance import ClassifierFree, guided
from latentgen.diffusion.schedule import NoiseLevel
from latentgen.diffusion.scheduler import Scheduler

SHAPE = (2, 4, 6, 6)
STABLE_DIFFUSION = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}

TWO_STAGE = (
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DPMSolverSDEScheduler",
)
IN_SIGMA_VE = (
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "LMSDiscreteScheduler",
    *TWO_STAGE,
)
STOCHASTIC = (
    "DDPMScheduler",
    "EulerAncestralDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "LCMScheduler",
    "TCDScheduler",
)

_MIX = torch.randn(4, 4, generator=torch.Generator().manual_seed(3)) / 2


class Run(NamedTuple):
    """The latents after every step, and what the noise generator would give next."""

    latents: list[Tensor]
    next_draw: Tensor


def scheduler_class(name: str) -> Any:
    """A class of diffusers; where its packages are not installed, without scipy and torchsde.

    The one integral that LMS asks scipy for is done here, and so are the quantiles of beta sigmas and the Brownian
    motion that DPM++ SDE follows.
    """
    found = _scheduler_class(name)
    module = found.set_timesteps.__globals__
    if "scipy" not in module:
        module["scipy"] = SimpleNamespace(stats=SimpleNamespace(beta=SimpleNamespace(ppf=beta_quantile)))
        module["is_scipy_available"] = lambda: True
    return found


@cache
def beta_quantile(share: float, a: float, b: float) -> float:
    """By bisection of mpmath's distribution function."""
    low, high = 0.0, 1.0
    while low < (middle := (low + high) / 2) < high:
        below = mpmath.betainc(a, b, 0, middle, regularized=True) < share
        low, high = (middle, high) if below else (low, middle)
    return high if share > 0.0 else 0.0


def _scheduler_class(name: str) -> Any:
    if name == "DPMSolverSDEScheduler":
        with patch.dict(sys.modules, {"torchsde": sys.modules.get("torchsde", ModuleType("torchsde"))}):
            from diffusers.schedulers.scheduling_dpmsolver_sde import DPMSolverSDEScheduler
        return DPMSolverSDEScheduler
    if name == "LMSDiscreteScheduler":
        from diffusers.schedulers import scheduling_lms_discrete as module

        if not hasattr(module, "integrate"):
            vars(module)["integrate"] = SimpleNamespace(quad=integral_of_a_cubic)
        return module.LMSDiscreteScheduler
    return getattr(diffusers, name)


def integral_of_a_cubic(
    function: Callable[[float], float], start: float | Tensor, end: float | Tensor, epsrel: float
) -> tuple[float]:
    """In the place of scipy's integrate.quad."""
    nodes, weights = np.polynomial.legendre.leggauss(4)
    middle, half = float(start + end) / 2, float(end - start) / 2
    return (
        half
        * sum(
            weight * float(function(middle + half * node))
            for node, weight in zip(nodes, weights, strict=True)
        ),
    )


class BrownianMotion:
    """Its increments, as normal noise: from a noise level to half way, then from there to the end of the same step."""

    def __init__(self, noise: Callable[[], Tensor]) -> None:
        self._noise = noise
        self._begun: tuple[float, Tensor] | None = None

    def __call__(self, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        noise = self._noise()
        if self._begun is None:
            self._begun = float(sigma_next), noise
            return noise
        (middle, first), self._begun = self._begun, None
        begun, rest = float(sigma) - middle, middle - float(sigma_next)
        return (begun**0.5 * first + rest**0.5 * noise) / (begun + rest) ** 0.5


def network(x: Tensor, timestep: float | Tensor) -> Tensor:
    """A smooth stand-in for a UNet: it depends on every channel of x and on the timestep."""
    timestep = torch.as_tensor(timestep, dtype=x.dtype)
    mixed = torch.einsum("oc,bchw->bohw", _MIX.to(x.dtype), x)
    return torch.tanh(mixed) * torch.cos(timestep / 300) + 0.5 * torch.sin(x + timestep / 200)


def normal_noise(seed: int = 1) -> tuple[torch.Generator, Callable[[], Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return generator, lambda: torch.randn(SHAPE, generator=generator)


def run_diffusers(scheduler: Any, num_steps: int | None, **by_hand: list[int] | list[float]) -> Run:
    """Step by step as diffusers' pipelines do; latents in the scale alpha**2 + sigma**2 == 1."""
    scheduler.set_timesteps(num_steps, **by_hand)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    name = type(scheduler).__name__
    generator, noise = normal_noise()
    x = noise() * getattr(scheduler, "init_noise_sigma", 1.0)
    is_sde = str(scheduler.config.get("algorithm_type", "")).startswith("sde")
    draws = {"generator": generator} if name in STOCHASTIC or is_sde else {}
    if name in ("DEISMultistepScheduler", "LMSDiscreteScheduler"):
        # In float32 the coefficients of their higher orders lose two digits to cancellation.
        scheduler.sigmas = scheduler.sigmas.double()
    if name == "DPMSolverSDEScheduler":
        scheduler.noise_sampler = BrownianMotion(noise)
    scaled = getattr(scheduler, "scale_model_input", lambda x, timestep: x)
    latents = []
    for index, timestep in enumerate(scheduler.timesteps):
        output = network(scaled(x, timestep), timestep)
        x = scheduler.step(output, timestep, x, **draws).prev_sample
        scale = (1 + scheduler.sigmas[index + 1] ** 2) ** 0.5 if name in IN_SIGMA_VE else 1.0
        latents.append(x / scale)
    return Run(_ends_of_steps(latents, scheduler), torch.randn(1, generator=generator))


def _ends_of_steps(latents: list[Tensor], scheduler: Any) -> list[Tensor]:
    """Without those that steps of several evaluations only look ahead from."""
    name = type(scheduler).__name__
    if name in TWO_STAGE:
        return [*latents[1::2], latents[-1]]
    if name == "PNDMScheduler" and scheduler.config.skip_prk_steps:
        return latents[1:] if len(latents) > 1 else latents
    if name == "PNDMScheduler":
        return [*latents[3:12:4], *latents[12:]]
    return latents


def run_ours(scheduler: Scheduler, num_steps: int) -> Run:
    return run_over(scheduler, scheduler.levels(num_steps))


def run_over(scheduler: Scheduler, levels: Sequence[NoiseLevel]) -> Run:
    generator, noise = normal_noise()
    denoiser = guided(
        lambda x, level, rows: (network(x, level.timestep),), scheduler.prediction_type, ClassifierFree(1.0)
    )
    steps = scheduler.sample(denoiser, scheduler.initial(noise(), levels), levels, noise)
    return Run([step.latents for step in steps], torch.randn(1, generator=generator))


def largest_relative_difference(ours: Run, theirs: Run) -> float:
    """Over all steps, the norm of the difference over the norm; also checks that both drew the same noise."""
    assert len(ours.latents) == len(theirs.latents)
    assert torch.equal(ours.next_draw, theirs.next_draw)
    pairs = zip(ours.latents, theirs.latents, strict=True)
    return max(float((mine - other).norm() / other.norm()) for mine, other in pairs)
