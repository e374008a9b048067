"""Step for step against k-diffusion's samplers: same noise, same network, and against its spacings. CI installs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from inspect import signature
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from latentgen.diffusion.guidance import ClassifierFree, guided
from latentgen.diffusion.schedule import CLEAN, NoiseLevel
from latentgen.diffusion.scheduler import Scheduler
from latentgen.diffusion.solver_names import SolverName
from latentgen.diffusion.solvers.single_step import Evaluation, StepInputs
from latentgen.diffusion.solvers.table import SOLVERS
from tests.diffusion.k_diffusion import BrownianNoise, k_diffusion_or_skip
from tests.diffusion.references import STABLE_DIFFUSION, network, normal_noise

sampling, external = k_diffusion_or_skip()

SCHEDULER = Scheduler.from_config({"_class_name": "EulerDiscreteScheduler", **STABLE_DIFFUSION})
SIGMA_MIN, SIGMA_MAX = (float(SCHEDULER.schedule.sigmas_ve[index]) for index in (0, -1))
NUM_STEPS = (5, 10, 50)
# Both in float64, where far less than the 1e-5 of float32 tells a difference in the method from rounding.
TOLERANCE = 1e-11


class Case(NamedTuple):
    """A solver and the sampler of k-diffusion that it is, at this eta, or at the sampler's default."""

    solver: SolverName
    sampler: str
    eta: float | None = None


CASES = [
    Case("euler", "sample_euler"),
    Case("euler_ancestral", "sample_euler_ancestral"),
    Case("heun", "sample_heun"),
    Case("dpm2", "sample_dpm_2"),
    Case("dpm2_ancestral", "sample_dpm_2_ancestral"),
    Case("lms", "sample_lms"),
    Case("dpmpp_2m", "sample_dpmpp_2m"),
    Case("dpmpp_2m", "sample_dpmpp_2m_sde", eta=0.0),
    Case("dpmpp_2m_sde", "sample_dpmpp_2m_sde"),
    Case("dpmpp_sde", "sample_dpmpp_sde"),
    Case("dpmpp_2s", "sample_dpmpp_2s_ancestral", eta=0.0),
]
THIRD_ORDER = [Case("dpmpp_3m", "sample_dpmpp_3m_sde", eta=0.0), Case("dpmpp_3m_sde", "sample_dpmpp_3m_sde")]


class TheirStep(NamedTuple):
    """What k-diffusion's callback is told: x and denoised where a step begins."""

    x: Tensor
    denoised: Tensor


def draws() -> Callable[[], Tensor]:
    _, noise = normal_noise()
    return lambda: noise().double()


def run_theirs(
    case: Case, sigmas: Sequence[float], x_ve: Tensor, noise: Callable[[], Tensor]
) -> tuple[list[TheirStep], Tensor]:
    """Its steps, and where they end; the network is told whole timesteps where ours tells it these."""
    sampler = getattr(sampling, case.sampler)
    alphas_cumprod = torch.from_numpy(SCHEDULER.schedule.alphas_cumprod.copy())
    model = external.DiscreteEpsDDPMDenoiser(
        lambda x, timesteps: network(x, timesteps[0]),
        alphas_cumprod,
        quantize=SOLVERS[case.solver].whole_timesteps == "always",
    )
    draws_noise = "noise_sampler" in signature(sampler).parameters
    arguments = {"noise_sampler": BrownianNoise(noise)} if draws_noise else {}
    if case.eta is not None:
        arguments["eta"] = case.eta
    steps: list[TheirStep] = []
    end = sampler(
        model,
        x_ve,
        torch.tensor(sigmas, dtype=torch.float64),
        callback=lambda told: steps.append(TheirStep(told["x"], told["denoised"])),
        disable=True,
        **arguments,
    )
    return steps, end


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("num_steps", NUM_STEPS)
@pytest.mark.parametrize("case", CASES)
def test_every_step_is_that_of_k_diffusion(case: Case, num_steps: int) -> None:
    scheduler = replace(SCHEDULER, solver=case.solver)
    sigmas = [*np.geomspace(SIGMA_MAX, SIGMA_MIN, num_steps), 0.0]
    # Where k-diffusion goes half way and back, our steps of 2S have a level of their own.
    halves = [(high * low) ** 0.5 for high, low in pairwise(sigmas[:-1])]
    by_hand = sorted([*sigmas, *halves], reverse=True) if case.solver == "dpmpp_2s" else sigmas
    levels = scheduler.levels_at(sigmas=by_hand)

    noise = draws()
    x = scheduler.initial(noise(), levels)
    denoiser = guided(lambda x, level, rows: (network(x, level.timestep),), "epsilon", ClassifierFree(1.0))
    ours = [(step.level, step.latents) for step in scheduler.sample(denoiser, x, levels, noise)]
    if case.solver == "dpmpp_2s":
        ours = [*ours[1::2], ours[-1]]

    noise = draws()
    steps, end = run_theirs(case, sigmas, scheduler.initial(noise(), levels) / levels[0].alpha, noise)
    theirs = [*(step.x for step in steps[1:]), end]
    differences = [
        relative_difference(mine, level.alpha * other)
        for (level, mine), other in zip(ours, theirs, strict=True)
    ]
    assert max(differences) < TOLERANCE


@pytest.mark.parametrize("num_steps", NUM_STEPS)
@pytest.mark.parametrize("case", THIRD_ORDER)
def test_every_step_of_third_order_is_that_of_k_diffusion(case: Case, num_steps: int) -> None:
    """Each from where k-diffusion stands, as its second step is another of second order: see docs/departures.md."""
    sigmas = [*np.geomspace(SIGMA_MAX, SIGMA_MIN, num_steps), 0.0]
    levels = [*replace(SCHEDULER, solver=case.solver).levels_at(sigmas=sigmas)[:-1], CLEAN]
    noise = draws()
    steps, end = run_theirs(case, sigmas, SIGMA_MAX * noise(), noise)
    ends = [*(step.x for step in steps[1:]), end]
    evaluations = [
        Evaluation(level, level.alpha * step.x, step.denoised, "epsilon")
        for level, step in zip(levels, steps, strict=False)
    ]

    noise = draws()
    noise()
    for index in range(num_steps):
        is_last = index == num_steps - 1
        inputs = StepInputs(
            index=index,
            history=tuple(reversed(evaluations[max(0, index - 2) : index])),
            order=1 if is_last else 3,
            is_last=is_last,
            evaluate=no_evaluation,
            draw=noise,
            schedule=SCHEDULER.schedule,
            timestep_scaling=10.0,
        )
        stepped = SOLVERS[case.solver].step(evaluations[index], levels[index + 1], inputs)
        if index != 1:
            assert relative_difference(stepped, levels[index + 1].alpha * ends[index]) < TOLERANCE


def no_evaluation(x: Tensor, level: NoiseLevel) -> Evaluation:
    raise AssertionError("a step of one evaluation asked for another")


@pytest.mark.parametrize("num_steps", NUM_STEPS)
@pytest.mark.parametrize(("spacing", "solver"), [("karras", "euler"), ("exponential", "dpmpp_2m")])
def test_spacings_are_those_of_k_diffusion(spacing: str, solver: str, num_steps: int) -> None:
    levels = SCHEDULER.with_solver(f"{solver}_{spacing}").levels(num_steps)
    expected = getattr(sampling, f"get_sigmas_{spacing}")(num_steps, SIGMA_MIN, SIGMA_MAX)
    found = torch.tensor([level.sigma / level.alpha for level in levels])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def discrete_schedule() -> Any:
    return external.DiscreteSchedule(torch.from_numpy(SCHEDULER.schedule.sigmas_ve.copy()), quantize=False)


def test_the_timesteps_of_sigmas_are_those_of_k_diffusion() -> None:
    sigmas = np.geomspace(SIGMA_MIN, SIGMA_MAX, 2001)
    expected = discrete_schedule().sigma_to_t(torch.from_numpy(sigmas))
    np.testing.assert_allclose(SCHEDULER.schedule.timestep_at(sigmas), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("num_steps", NUM_STEPS)
def test_sgm_uniform_is_its_schedule_at_even_timesteps_that_stop_short(num_steps: int) -> None:
    levels = SCHEDULER.with_solver("euler_sgm_uniform").levels(num_steps)
    expected = discrete_schedule().t_to_sigma(torch.linspace(999, 0, num_steps + 1)[:-1])
    found = torch.tensor([level.sigma / level.alpha for level in levels[:-1]], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_linspace_is_its_schedule_where_timesteps_are_whole() -> None:
    levels = replace(SCHEDULER, spacing="linspace").levels(28)  # 999 is 27 strides of 37
    expected = discrete_schedule().get_sigmas(28)
    found = torch.tensor([level.sigma / level.alpha for level in levels], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
