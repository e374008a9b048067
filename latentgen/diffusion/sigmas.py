"""Spacings of noise levels (Karras, exponential, beta, ...), which replace a spacing of timesteps.

They are in sigma_ve on a NoiseSchedule, in sigma on a FlowSchedule.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from latentgen.diffusion.schedule import FloatArray, NoiseSchedule
from latentgen.diffusion.solver_names import Sigmas
from latentgen.errors import InputError
from latentgen.files import quote

# The longest list of custom timesteps or sigmas.
_MAX_LEVELS = 1001
# The ten steps and the end that arXiv:2404.14507 publishes for SD 1.5 and for SDXL, on the schedule of both.
_ALIGN_YOUR_STEPS = {
    "align_your_steps": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "align_your_steps_xl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
}


def spaced_sigmas(
    sigmas: Sigmas, schedule: NoiseSchedule, sigma_min: float, sigma_max: float, num_steps: int
) -> FloatArray:
    """`num_steps` values of sigma_ve, falling.

    Karras, exponential and beta sigmas end at sigma_min; the others follow the schedule or a table, and leave out the
    lowest point, which is the final level.
    """
    match sigmas:
        case "sgm_uniform":
            return sgm_uniform_sigmas(schedule, num_steps)
        case "align_your_steps" | "align_your_steps_xl":
            return _resampled(_ALIGN_YOUR_STEPS[sigmas], num_steps)
        case _:
            return sigmas_between(sigmas, sigma_min, sigma_max, num_steps)


def sigmas_between(
    sigmas: Literal["karras", "exponential", "beta"], sigma_min: float, sigma_max: float, num_steps: int
) -> FloatArray:
    """`num_steps` values from sigma_max down to sigma_min.

    Karras sigmas (arXiv 2206.00364, eq. 5) are even in ``sigma ** (1 / 7)``, exponential ones in ``log(sigma)``; beta
    sigmas (arXiv 2407.12173) are at quantiles of Beta(0.6, 0.6), which is denser at both ends.
    """
    if sigmas == "karras":
        rho = 7.0
        return np.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), num_steps) ** rho
    if sigmas == "exponential":
        return np.exp(np.linspace(math.log(sigma_max), math.log(sigma_min), num_steps))
    return sigma_min + (sigma_max - sigma_min) * beta_quantiles(np.linspace(1.0, 0.0, num_steps), 0.6)


def sgm_uniform_sigmas(schedule: NoiseSchedule, num_steps: int) -> FloatArray:
    """sigma_ve at evenly spaced timesteps, from the last of the schedule down; the lowest, 0, is left out.

    Between whole timesteps log(sigma_ve) is linear, as in k-diffusion.
    """
    last = schedule.num_train_timesteps - 1
    timesteps = np.linspace(last, 0.0, num_steps + 1)[:-1]
    return np.exp(np.interp(timesteps, np.arange(last + 1), np.log(schedule.sigmas_ve)))


def _resampled(published: tuple[float, ...], num_steps: int) -> FloatArray:
    """Resample a published list of sigma_ve to `num_steps`, linearly in the logarithm; the last is left out."""
    points = np.linspace(0.0, len(published) - 1, num_steps + 1)[:-1]
    return np.exp(np.interp(points, np.arange(len(published)), np.log(published)))


def beta_quantiles(shares: FloatArray, shape: float) -> FloatArray:
    """The quantiles of Beta(shape, shape) at `shares` in 0..1, for a shape in 0..1, to float64 precision.

    Up to x = 1/2 the distribution function is a series in x (DLMF 8.17.7) that is increasing and convex in
    u = x**shape, and its first term is below it; so Newton's method from that term's root falls to the quantile.
    The upper half mirrors the lower.
    """
    lower = np.minimum(shares, 1.0 - shares)
    scale = shape * math.gamma(shape) ** 2 / math.gamma(2.0 * shape)
    orders = np.arange(60)  # the terms fall like x**k, so by then to 2**-60
    ratios = (orders[1:] - shape) / orders[1:]
    coefficients = np.concatenate([[1.0], np.cumprod(ratios)]) * shape / (shape + orders)
    u = scale * lower
    for _ in range(12):
        x = u ** (1.0 / shape)
        series = np.polynomial.polynomial.polyval(x, coefficients)
        u = u - (u * series - scale * lower) * (1.0 - x) ** (1.0 - shape)
    x = u ** (1.0 / shape)
    return np.where(shares <= 0.5, x, 1.0 - x)


def falling_numbers(name: str, values: Sequence[float], most: float, slack: float = 1.0) -> FloatArray:
    """Check a custom list: numbers from 0 to `most`, strictly falling. Raises InputError."""
    try:
        numbers = np.array([float(value) for value in values])
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"{name} must be a list of numbers, not {quote(values)}") from None
    if not 1 <= len(numbers) <= _MAX_LEVELS:
        raise InputError(f"{name} has {len(numbers)} entries; it needs 1..{_MAX_LEVELS}")
    outside = ~((numbers >= 0.0) & (numbers <= most * slack))
    if outside.any():
        raise InputError(
            f"{name}[{outside.argmax()}] is {numbers[outside.argmax()]:g}; the schedule has 0..{most:g}"
        )
    rises = np.diff(numbers) >= 0.0
    if rises.any():
        index = int(rises.argmax())
        raise InputError(
            f"{name} must fall, but {numbers[index + 1]:g} follows {numbers[index]:g} at [{index + 1}]"
        )
    return numbers
