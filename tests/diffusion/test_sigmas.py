from __future__ import annotations

import math
from itertools import pairwise

import diffusers
import mpmath
import numpy as np
import pytest
from diffusers.schedulers import AysSchedules

from latentgen.diffusion.schedule import NoiseSchedule
from latentgen.diffusion.scheduler import Scheduler
from latentgen.diffusion.sigmas import beta_quantiles

STABLE_DIFFUSION = NoiseSchedule(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
ALIGN_YOUR_STEPS = [("align_your_steps", "StableDiffusion"), ("align_your_steps_xl", "StableDiffusionXL")]


@pytest.mark.parametrize("shape", [0.3, 0.5, 0.6, 0.9, 1.0])
def test_quantiles_of_beta_are_exact(shape: float) -> None:
    shares = np.array([1e-12, 1e-4, 0.02, 0.1, 0.3, 0.499, 0.5, 0.7, 0.95])
    for share, quantile in zip(shares, beta_quantiles(shares, shape), strict=True):
        below = mpmath.betainc(shape, shape, 0, quantile, regularized=True)
        assert float(below) == pytest.approx(share, rel=1e-13)


def test_sgm_uniform_is_the_linspace_of_diffusers_where_its_timesteps_are_whole() -> None:
    oracle = diffusers.DPMSolverMultistepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    )
    oracle.set_timesteps(27)  # 999 is a multiple
    levels = Scheduler(STABLE_DIFFUSION).with_solver("DPM++ 2M SGM Uniform").levels(27)
    assert [level.timestep for level in levels[:-1]] == oracle.timesteps.tolist()
    sigmas = [level.sigma / level.alpha for level in levels]
    np.testing.assert_allclose(sigmas, oracle.sigmas.numpy(), rtol=1e-6)


@pytest.mark.parametrize(("sigmas", "published"), ALIGN_YOUR_STEPS)
def test_align_your_steps_are_the_published_steps(sigmas: str, published: str) -> None:
    levels = Scheduler(STABLE_DIFFUSION).with_solver(f"dpmpp_2m_{sigmas}").levels(10)
    sigmas_ve = [level.sigma / level.alpha for level in levels]
    assert sigmas_ve == pytest.approx(AysSchedules[f"{published}Sigmas"], rel=1e-12)
    timesteps = [level.timestep for level in levels[:-1]]
    # Published for the UNet's own timesteps, to about half a per mille of the schedule.
    assert timesteps == pytest.approx(AysSchedules[f"{published}Timesteps"], abs=1.5)


@pytest.mark.parametrize(("sigmas", "published"), ALIGN_YOUR_STEPS)
def test_align_your_steps_at_other_counts_are_log_linear(sigmas: str, published: str) -> None:
    ten = AysSchedules[f"{published}Sigmas"]
    levels = Scheduler(STABLE_DIFFUSION).with_solver(f"euler_{sigmas}").levels(20)
    sigmas_ve = [level.sigma / level.alpha for level in levels]
    assert sigmas_ve[:20:2] == pytest.approx(ten[:10], rel=1e-12)
    means = [math.sqrt(above * below) for above, below in pairwise(ten[:10])]
    assert sigmas_ve[1:18:2] == pytest.approx(means, rel=1e-12)


@pytest.mark.parametrize("num_steps", [1, 2, 1000])
@pytest.mark.parametrize("solver", ["euler", "dpm2"])
@pytest.mark.parametrize("sigmas", ["karras", "exponential", "beta", "sgm_uniform", "align_your_steps"])
def test_every_step_count_is_spaced(sigmas: str, solver: str, num_steps: int) -> None:
    levels = Scheduler(STABLE_DIFFUSION).with_solver(f"{solver}_{sigmas}").levels(num_steps)
    assert len(levels) == num_steps + 1
    assert all(level.sigma >= target.sigma for level, target in pairwise(levels))
    # The linspace of diffusers, too, has but its lower end for a run of one step.
    assert levels[0].timestep == 999 or num_steps == 1
