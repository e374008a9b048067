"""How fast the errors of the solvers fall, on a Gaussian mixture in one dimension: its score and flow are known.

One setting for all solvers: from end to end of Stable Diffusion's noise levels, even in log_snr and in timesteps, so
that PNDM, which knows whole timesteps alone, has levels half way, too. A run ends at the last noisy level: the step
from there to clean data is of first order in all solvers.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from latentgen.diffusion.schedule import CLEAN, NoiseLevel, NoiseSchedule
from latentgen.diffusion.scheduler import Scheduler
from latentgen.diffusion.solver_names import SolverName

WEIGHTS, MEANS, DEVIATIONS = torch.tensor(
    [[0.5, 0.3, 0.2], [-1.0, 0.3, 1.2], [0.3, 0.25, 0.4]], dtype=torch.float64
)
STEP_COUNTS = (20, 40, 80, 160)
# The order that each solver without fresh noise should show, 3 for third or more. LMS is of order 4 once it has a
# history of three; its first steps, of lower orders, hold the slope below that. PNDM is of order 2 (arXiv
# 2202.09778, section 3), though its weights are those of methods of order 4: they do not know how sigma_ve falls.
ORDERS: dict[SolverName, int] = {
    "ddim": 1,
    "euler": 1,
    "heun": 2,
    "dpm2": 2,
    "dpmpp_2m": 2,
    "dpmpp_2s": 2,
    "dpmpp_3m": 2,
    "deis": 2,
    "pndm": 2,
    "pndm_prk": 2,
    "unipc": 3,
    "lms": 3,
}
SLOPES = {1: (0.85, 1.15), 2: (1.8, 2.2), 3: (2.6, float("inf"))}

# As the levels of a run divide the timesteps evenly, and half way between two lies a whole one.
_LAST_TIMESTEP = 6 * STEP_COUNTS[-1]


@cache
def even_schedule() -> NoiseSchedule:
    """A schedule whose log_snr falls evenly, over Stable Diffusion's range."""
    stable_diffusion = NoiseSchedule(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    sigmas_ve = np.geomspace(*stable_diffusion.sigmas_ve[[0, -1]], _LAST_TIMESTEP + 1)
    alphas_cumprod = 1.0 / (1.0 + sigmas_ve**2)
    betas = 1.0 - alphas_cumprod / np.concatenate([[1.0], alphas_cumprod[:-1]])
    return NoiseSchedule(num_train_timesteps=_LAST_TIMESTEP + 1, trained_betas=tuple(betas.tolist()))


def mixture_denoiser(x: Tensor, level: NoiseLevel) -> Tensor:
    """E[x0 | x], for x of any shape."""
    x = x[..., None]
    variances = (level.alpha * DEVIATIONS) ** 2 + level.sigma**2
    residuals = x - level.alpha * MEANS
    posterior = torch.softmax(WEIGHTS.log() - variances.log() / 2 - residuals**2 / (2 * variances), dim=-1)
    return (posterior * (MEANS + level.alpha * DEVIATIONS**2 / variances * residuals)).sum(-1)


def distribution(x: Tensor, level: NoiseLevel) -> Tensor:
    """The share of the mixture below x at a noise level, for x of any shape."""
    deviations = ((level.alpha * DEVIATIONS) ** 2 + level.sigma**2).sqrt()
    return (WEIGHTS * torch.special.ndtr((x[..., None] - level.alpha * MEANS) / deviations)).sum(-1)


def mixture_flow(x: Tensor, level: NoiseLevel, target: NoiseLevel) -> Tensor:
    """Where the probability flow leads from x: in one dimension no path overtakes another, so each keeps its quantile.

    Found by bisection, to float64's precision.
    """
    shares = distribution(x, level)
    low, high = torch.full_like(x, -20.0), torch.full_like(x, 20.0)
    for _ in range(64):
        middle = (low + high) / 2
        below = distribution(middle, target) < shares
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def no_noise() -> Tensor:
    raise AssertionError("a deterministic solver drew noise")


def start() -> Tensor:
    """Sixteen x of a standard normal distribution, at its quantiles."""
    return torch.special.ndtri((torch.arange(16, dtype=torch.float64) + 0.5) / 16)


def run_levels(num_steps: int) -> tuple[NoiseLevel, ...]:
    """The noisy levels of a run of so many steps."""
    stride = _LAST_TIMESTEP // num_steps
    return tuple(even_schedule().level(_LAST_TIMESTEP - stride * index) for index in range(num_steps + 1))


def error(solver: SolverName, num_steps: int) -> float:
    """The root mean square, over `start`, of how far a run ends from the exact solution."""
    levels = run_levels(num_steps)
    *_, last = Scheduler(even_schedule(), solver=solver).sample(
        mixture_denoiser, start(), (*levels, CLEAN), no_noise, stop=num_steps
    )
    return float((last.latents - mixture_flow(start(), levels[0], levels[-1])).square().mean().sqrt())


def slope(errors: list[float]) -> float:
    """The order that errors at STEP_COUNTS show: the falling slope of a line through their logarithms."""
    return -float(np.polyfit(np.log(STEP_COUNTS), np.log(errors), 1)[0])
