"""The order of convergence of every deterministic solver, and that the problem it is measured on is what it says."""

from __future__ import annotations

import mpmath
import pytest
import torch

from latentgen.diffusion.schedule import NoiseLevel
from latentgen.diffusion.solver_names import SOLVER_TABLE, SolverName
from latentgen.diffusion.solvers.table import SOLVERS
from tests.diffusion.mixture import (
    DEVIATIONS,
    MEANS,
    ORDERS,
    SLOPES,
    STEP_COUNTS,
    WEIGHTS,
    error,
    mixture_denoiser,
    mixture_flow,
    run_levels,
    slope,
    start,
)

STOCHASTIC = {
    *("ddpm", "euler_ancestral", "dpm2_ancestral", "dpmpp_2m_sde", "dpmpp_3m_sde", "dpmpp_sde"),
    *("lcm", "tcd"),
}


@pytest.mark.parametrize("solver", ORDERS)
def test_order_of_convergence(solver: SolverName) -> None:
    least, most = SLOPES[ORDERS[solver]]
    assert least <= slope([error(solver, num_steps) for num_steps in STEP_COUNTS]) <= most


def test_no_deterministic_solver_is_left_out() -> None:
    assert set(ORDERS) | STOCHASTIC | {"flow_euler"} == set(SOLVER_TABLE)
    assert SOLVERS["flow_euler"].step is SOLVERS["euler"].step


def test_the_levels_are_even_in_log_snr_and_end_where_those_of_stable_diffusion_do() -> None:
    levels = run_levels(160)
    assert levels[0].sigma / levels[0].alpha == pytest.approx(14.6146, rel=1e-4)
    assert levels[-1].sigma / levels[-1].alpha == pytest.approx(0.029167, rel=1e-4)
    strides = torch.tensor([level.log_snr for level in levels]).diff()
    torch.testing.assert_close(strides, strides.mean().expand(160), rtol=2e-3, atol=0)


@pytest.mark.parametrize("sigma_ve", [0.05, 0.5, 5.0])
def test_the_denoiser_is_the_mean_of_the_posterior(sigma_ve: float) -> None:
    """Against the integrals that define it."""
    level = NoiseLevel.from_sigma_ve(sigma_ve, 0.0)

    def joint(x0: float, x: float) -> float:
        components = zip(WEIGHTS.tolist(), MEANS.tolist(), DEVIATIONS.tolist(), strict=True)
        prior = sum(weight * mpmath.npdf(x0, mean, deviation) for weight, mean, deviation in components)
        return prior * mpmath.npdf(x, level.alpha * x0, level.sigma)

    for x in (-1.1, 0.0, 0.8):
        peak = x / level.alpha
        bounds = [-4.0, *sorted((peak - 4 * sigma_ve, peak, peak + 4 * sigma_ve)), 4.0]
        bounds = sorted(min(4.0, max(-4.0, bound)) for bound in bounds)
        mass = mpmath.quad(lambda x0, x=x: joint(x0, x), bounds)
        mean = mpmath.quad(lambda x0, x=x: x0 * joint(x0, x), bounds) / mass
        found = mixture_denoiser(torch.tensor(x, dtype=torch.float64), level)
        assert float(found) == pytest.approx(float(mean), abs=1e-9)


def test_the_flow_is_that_of_another_integrator() -> None:
    """mpmath's Taylor series on ``dx_ve / dlog_snr = x0 - x_ve`` (arXiv 2206.00364, eq. 1)."""
    levels = run_levels(20)
    first, last = levels[0], levels[-1]

    def derivative(log_snr: mpmath.mpf, x_ve: mpmath.mpf) -> mpmath.mpf:
        mass = mean = mpmath.mpf(0)
        for weight, center, deviation in zip(
            WEIGHTS.tolist(), MEANS.tolist(), DEVIATIONS.tolist(), strict=True
        ):
            variance = deviation**2 + mpmath.exp(-2 * log_snr)
            density = weight * mpmath.npdf(x_ve, center, mpmath.sqrt(variance))
            mass += density
            mean += density * (center + deviation**2 / variance * (x_ve - center))
        return mean / mass - x_ve

    exact = mixture_flow(start(), first, last)
    for index in (2, 8, 14):
        begin = float(start()[index]) / first.alpha
        solution = mpmath.odefun(derivative, first.log_snr, begin, tol=1e-10)
        end = float(solution(last.log_snr)) * last.alpha
        assert float(exact[index]) == pytest.approx(end, abs=1e-8)
