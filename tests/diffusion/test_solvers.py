"""The steps against the papers' own formulas, in float64, and against problems with a known solution."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from latentgen.diffusion.schedule import CLEAN, NoiseLevel, NoiseSchedule
from latentgen.diffusion.scheduler import Scheduler
from latentgen.diffusion.solvers.multistep import dpmpp_2m_step, dpmpp_3m_sde_step, interpolation_weights
from latentgen.diffusion.solvers.single_step import (
    Evaluation,
    StepInputs,
    first_order_step,
    fresh_noise_scale,
)
from latentgen.diffusion.solvers.table import SolverName

STABLE_DIFFUSION = NoiseSchedule(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
MEAN, DEVIATION = 0.5, 0.4

timesteps = st.lists(st.integers(0, 999), min_size=2, max_size=2, unique=True).map(sorted)


def draw(seed: int) -> Tensor:
    return torch.randn(64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, X0, NOISE = draw(0), draw(1), draw(2)


def evaluation(level: NoiseLevel, x: Tensor, x0: Tensor) -> Evaluation:
    return Evaluation(level, x, x0, "epsilon")


def stochastic_step(level: NoiseLevel, target: NoiseLevel, eta: float) -> Tensor:
    return first_order_step(evaluation(level, X, X0), target, fresh_noise_scale(level, target, eta), NOISE)


def no_noise() -> Tensor:
    raise AssertionError("a deterministic solver drew noise")


def inputs(*history: Evaluation) -> StepInputs:
    return StepInputs(
        history=history,
        index=len(history),
        order=1 + len(history),
        is_last=False,
        evaluate=lambda x, level: evaluation(level, x, gaussian_denoiser(x, level)),
        draw=no_noise,
        schedule=STABLE_DIFFUSION,
        timestep_scaling=10.0,
    )


def levels_at(pair: list[int]) -> tuple[NoiseLevel, NoiseLevel]:
    return STABLE_DIFFUSION.level(pair[1]), STABLE_DIFFUSION.level(pair[0])


@settings(deadline=None)
@given(timesteps)
def test_at_eta_1_it_is_the_posterior_of_ddpm(pair: list[int]) -> None:
    level, target = levels_at(pair)
    ratio = level.alpha**2 / target.alpha**2  # alphas_cumprod_t / alphas_cumprod_s
    beta = 1 - ratio
    mean = (target.alpha * beta / level.sigma**2) * X0 + (
        math.sqrt(ratio) * target.sigma**2 / level.sigma**2
    ) * X
    expected = mean + math.sqrt(target.sigma**2 / level.sigma**2 * beta) * NOISE
    torch.testing.assert_close(stochastic_step(level, target, 1.0), expected, rtol=1e-11, atol=1e-11)


@settings(deadline=None)
@given(timesteps)
def test_it_is_euler_at_eta_0_and_euler_ancestral_at_eta_1(pair: list[int]) -> None:
    level, target = levels_at(pair)
    x_ve = X / level.alpha
    sigma, sigma_next = level.sigma / level.alpha, target.sigma / target.alpha
    ancestral = math.sqrt(sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2)
    for eta, sigma_up in ((0.0, 0.0), (1.0, ancestral)):
        sigma_down = math.sqrt(sigma_next**2 - sigma_up**2)
        stepped = x_ve + (x_ve - X0) / sigma * (sigma_down - sigma)
        expected = target.alpha * (stepped + sigma_up * NOISE)
        torch.testing.assert_close(stochastic_step(level, target, eta), expected, rtol=1e-10, atol=1e-10)


@settings(deadline=None)
@given(timesteps, st.floats(0.0, 1.0))
def test_any_eta_is_ddim_with_that_eta(pair: list[int], eta: float) -> None:
    level, target = levels_at(pair)
    epsilon = (X - level.alpha * X0) / level.sigma
    remaining = 1 - level.alpha**2 / target.alpha**2
    sigma_t = eta * target.sigma / level.sigma * math.sqrt(remaining)
    expected = target.alpha * X0 + math.sqrt(target.sigma**2 - sigma_t**2) * epsilon + sigma_t * NOISE
    torch.testing.assert_close(stochastic_step(level, target, eta), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_step_from_pure_noise_is_finite_and_a_step_to_clean_data_is_x0(eta: float) -> None:
    pure_noise = NoiseLevel(0.0, 1.0, 999.0)
    x = stochastic_step(pure_noise, STABLE_DIFFUSION.level(900), eta)
    assert x.isfinite().all()
    last = STABLE_DIFFUSION.level(1)
    torch.testing.assert_close(stochastic_step(last, CLEAN, eta), X0, rtol=0, atol=1e-15)


def test_dpmpp_2m_without_history_is_of_first_order() -> None:
    level, target = STABLE_DIFFUSION.level(800), STABLE_DIFFUSION.level(600)
    stepped = dpmpp_2m_step(evaluation(level, X, X0), target, inputs())
    assert torch.equal(stepped, first_order_step(evaluation(level, X, X0), target))


def test_dpmpp_2m_is_the_formula_of_its_paper() -> None:
    """arXiv 2211.01095, algorithm 2, in the paper's own terms."""
    before, level, target = (STABLE_DIFFUSION.level(timestep) for timestep in (900, 700, 550))
    h, h_before = target.log_snr - level.log_snr, level.log_snr - before.log_snr
    r = h_before / h
    d = (1 + 1 / (2 * r)) * X0 - 1 / (2 * r) * NOISE
    expected = target.sigma / level.sigma * X - target.alpha * math.expm1(-h) * d
    stepped = dpmpp_2m_step(evaluation(level, X, X0), target, inputs(evaluation(before, X, NOISE)))
    torch.testing.assert_close(stepped, expected, rtol=1e-11, atol=1e-11)


def test_dpmpp_3m_sde_is_the_formula_of_k_diffusion() -> None:
    """The intended departure from diffusers, which subtracts the half that the others add to the last coefficient."""
    levels = [STABLE_DIFFUSION.level(timestep) for timestep in (950, 900, 700, 550)]
    second, first, level, target = levels
    denoised, denoised_1, denoised_2 = X0, draw(3), draw(4)
    h, h_1, h_2 = (
        high.log_snr - low.log_snr for low, high in ((level, target), (first, level), (second, first))
    )
    r0, r1 = h_1 / h, h_2 / h
    d1_0, d1_1 = (denoised - denoised_1) / r0, (denoised_1 - denoised_2) / r1
    d1 = d1_0 + (d1_0 - d1_1) * r0 / (r0 + r1)
    d2 = (d1_0 - d1_1) / (r0 + r1)
    phi_2 = math.expm1(-2 * h) / (2 * h) + 1
    phi_3 = phi_2 / (2 * h) - 0.5
    x_ve = X / level.alpha
    x_ve = math.exp(-2 * h) * x_ve - math.expm1(-2 * h) * denoised + phi_2 * d1 - phi_3 * d2
    x_ve = x_ve + NOISE * target.sigma / target.alpha * math.sqrt(-math.expm1(-2 * h))

    history = (evaluation(first, X, denoised_1), evaluation(second, X, denoised_2))
    stepped = dpmpp_3m_sde_step(
        evaluation(level, X, X0), target, inputs(*history)._replace(draw=lambda: NOISE)
    )
    torch.testing.assert_close(stepped, target.alpha * x_ve, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_interpolation_weights_are_exact_for_polynomials(count: int) -> None:
    points = [14.6, 9.0, 5.5, 3.0][:count]
    weights = interpolation_weights(points, 14.6, 1.0)
    for power in range(count):
        exact = (1.0 - 14.6 ** (power + 1)) / (power + 1) / (1.0 - 14.6)
        mean = sum(weight * point**power for weight, point in zip(weights, points, strict=True))
        assert mean == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("solver", ["dpmpp_2m", "dpmpp_3m", "dpmpp_3m_sde", "dpmpp_2s", "deis", "unipc"])
def test_a_run_that_visits_the_level_where_it_ends_is_finite(solver: SolverName) -> None:
    scheduler = Scheduler(
        STABLE_DIFFUSION,
        solver=solver,
        sigmas="karras",
        final_sigmas_type="sigma_min",
        lower_order_final=False,
    )
    levels = scheduler.levels(20)
    end = (*levels[:-1], levels[-2])
    *_, before, last = scheduler.sample(gaussian_denoiser, X, end, lambda: NOISE)
    assert last.latents.isfinite().all()
    assert (last.latents - before.latents).abs().max() < 0.1


def gaussian_denoiser(x: Tensor, level: NoiseLevel) -> Tensor:
    """E[x0 | x] for x0 normal with MEAN and DEVIATION."""
    variance = level.alpha**2 * DEVIATION**2 + level.sigma**2
    return MEAN + level.alpha * DEVIATION**2 / variance * (x - level.alpha * MEAN)


@pytest.mark.parametrize(
    "solver", ["ddpm", "euler_ancestral", "dpm2_ancestral", "dpmpp_2m_sde", "dpmpp_3m_sde"]
)
def test_stochastic_solvers_sample_the_data_distribution(solver: SolverName) -> None:
    generator = torch.Generator().manual_seed(0)

    def noise() -> Tensor:
        return torch.randn(20_000, generator=generator, dtype=torch.float64)

    scheduler = Scheduler(STABLE_DIFFUSION, solver=solver)
    *_, last = scheduler.sample(gaussian_denoiser, noise(), scheduler.levels(900), noise)
    assert float(last.latents.mean()) == pytest.approx(MEAN, abs=0.015)
    assert float(last.latents.std()) == pytest.approx(DEVIATION, rel=0.02)


@pytest.mark.parametrize("solver", ["ddpm", "euler_ancestral"])
def test_for_one_data_point_every_marginal_is_exact(solver: SolverName) -> None:
    """With x0 known, x stays distributed as alpha * x0 + sigma * noise, whatever the number of steps."""
    generator = torch.Generator().manual_seed(0)

    def noise() -> Tensor:
        return torch.randn(20_000, generator=generator, dtype=torch.float64)

    scheduler = Scheduler(STABLE_DIFFUSION, solver=solver)
    levels = scheduler.levels(7)
    start = levels[0].alpha * MEAN + levels[0].sigma * noise()
    steps = list(scheduler.sample(lambda x, level: torch.full_like(x, MEAN), start, levels, noise))
    for step in steps[:-1]:
        residual = (step.latents - step.level.alpha * MEAN) / step.level.sigma
        assert float(residual.mean()) == pytest.approx(0.0, abs=0.03)
        assert float(residual.std()) == pytest.approx(1.0, abs=0.03)
    assert float((steps[-1].latents - MEAN).abs().max()) < 1e-12
