"""Solvers that combine the evaluation of a step with earlier ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from numpy.polynomial.polynomial import Polynomial, polyfromroots
from torch import Tensor

from latentgen.diffusion.flow_matching import Schedule
from latentgen.diffusion.schedule import NoiseLevel
from latentgen.diffusion.solvers.single_step import (
    Evaluation,
    History,
    StepInputs,
    ancestral_step,
    first_order_step,
    step_along_noise,
    step_along_output,
    weighted_sum,
)

# The number of outputs -> their weights, that of the latest first.
_ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


def dpmpp_2m_step(now: Evaluation, target: NoiseLevel, inputs: StepInputs) -> Tensor:
    """DPM-Solver++ 2M, midpoint (arXiv 2211.01095, algorithm 2); without a history it is of first order."""
    return first_order_step(now.with_x0(_midpoint_x0(now, target, inputs)), target)


def dpmpp_2m_sde_step(now: Evaluation, target: NoiseLevel, inputs: StepInputs) -> Tensor:
    """SDE-DPM-Solver++ 2M, midpoint (arXiv 2211.01095, appendix): along the same x0, at eta 1."""
    return ancestral_step(now.with_x0(_midpoint_x0(now, target, inputs)), target, inputs.draw())


def dpmpp_3m_step(now: Evaluation, target: NoiseLevel, inputs: StepInputs) -> Tensor:
    """DPM-Solver++ 3M (arXiv 2211.01095): with the orders of 2M until the history has two entries."""
    return first_order_step(now.with_x0(_third_order_x0(now, target, inputs, rate=1.0)), target)


def dpmpp_3m_sde_step(now: Evaluation, target: NoiseLevel, inputs: StepInputs) -> Tensor:
    """SDE-DPM-Solver++ 3M: along an x0 of third order, at eta 1."""
    x0 = _third_order_x0(now, target, inputs, rate=2.0)
    return ancestral_step(now.with_x0(x0), target, inputs.draw())


def _midpoint_x0(now: Evaluation, target: NoiseLevel, inputs: StepInputs) -> Tensor:
    """x0 half way to the target in log_snr, on the line through the last two."""
    if not inputs.history or inputs.order == 1:
        return now.x0
    before = inputs.history[0]
    stride = target.log_snr - now.level.log_snr
    stride_before = now.level.log_snr - before.level.log_snr
    return torch.lerp(before.x0, now.x0, 1.0 + 0.5 * stride / stride_before)


def _third_order_x0(now: Evaluation, target: NoiseLevel, inputs: StepInputs, *, rate: float) -> Tensor:
    """The mean of x0 over the step, from its Taylor series in log_snr through the last three.

    The weight decays with exp(-rate * h) over a stride h: `rate` is 1 for the deterministic solver, 2 for the
    stochastic. The quadratic term is halved, as in all the references.
    """
    if len(inputs.history) < 2 or inputs.order < 3:
        return _midpoint_x0(now, target, inputs)
    first, second = inputs.history
    h = target.log_snr - now.level.log_snr
    if h == 0.0:
        return now.x0
    r0 = (now.level.log_snr - first.level.log_snr) / h
    r1 = (first.level.log_snr - second.level.log_snr) / h
    slope0, slope1 = (now.x0 - first.x0) / r0, (first.x0 - second.x0) / r1
    bend = (slope0 - slope1) / (r0 + r1)
    decay = rate * h
    linear = -1.0 / math.expm1(-decay) - 1.0 / decay
    quadratic = -0.5 / math.expm1(-decay) - linear / decay
    return now.x0 + linear * (slope0 + r0 * bend) + quadratic * bend


def dpmpp_2s_step(now: Evaluation, target: NoiseLevel, inputs: StepInputs) -> Tensor:
    """DPM-Solver++ 2S (arXiv 2211.01095, algorithm 1), in pairs: the second step starts where the first started.

    It goes along the x0 half way in log_snr, on the line through the two.
    """
    if inputs.index % 2 == 0 or not inputs.history or inputs.order == 1:
        return first_order_step(now, target)
    before = inputs.history[0]
    whole = target.log_snr - before.level.log_snr
    first = now.level.log_snr - before.level.log_snr
    return first_order_step(before.with_x0(torch.lerp(before.x0, now.x0, 0.5 * whole / first)), target)


def pndm_step(now: Evaluation, target: NoiseLevel, inputs: StepInputs) -> Tensor:
    """PNDM in its linear multistep form, PLMS (arXiv 2202.09778, algorithm 2): Adams-Bashforth on the raw outputs.

    It is of order 4 after three steps; the first step has order 2 and evaluates the network at both of its ends.
    """
    outputs = [item.output for item in (now, *inputs.history)]
    if len(outputs) > 1 or inputs.is_last:
        return step_along_output(now, target, weighted_sum(_ADAMS_BASHFORTH[len(outputs)], outputs))
    ahead = inputs.evaluate(first_order_step(now, target), target)
    return step_along_output(now, target, (now.output + ahead.output) / 2)


def pndm_prk_step(now: Evaluation, target: NoiseLevel, inputs: StepInputs) -> Tensor:
    """PNDM (arXiv 2202.09778, algorithm 2): three pseudo Runge-Kutta steps, then `pndm_step`."""
    if len(inputs.history) == 3 or inputs.is_last:
        return pndm_step(now, target, inputs)
    middle = prk_middle(now.level, target, inputs.schedule)
    outputs = [now.output]
    for level in (middle, middle, target):
        x = step_along_output(now, level, outputs[-1])
        outputs.append(inputs.evaluate(x, level).output)
    return step_along_output(now, target, weighted_sum((1 / 6, 1 / 3, 1 / 3, 1 / 6), outputs))


def prk_middle(level: NoiseLevel, target: NoiseLevel, schedule: Schedule) -> NoiseLevel:
    """The level at half the timesteps between two."""
    return schedule.level(int(level.timestep - (level.timestep - target.timestep) // 2))


def lms_step(now: Evaluation, target: NoiseLevel, inputs: StepInputs) -> Tensor:
    """The linear multistep method of order 4: along the mean of the noise on a polynomial in sigma_ve."""
    known = (now, *inputs.history)
    points = [item.level.sigma / item.level.alpha for item in known]
    weights = interpolation_weights(points, points[0], target.sigma / target.alpha)
    return step_along_noise(now, target, weighted_sum(weights, [item.noise for item in known]))


def deis_step(now: Evaluation, target: NoiseLevel, inputs: StepInputs) -> Tensor:
    """DEIS (arXiv 2204.13902), of order 2 in log sigma_ve: along the mean of the noise on a line in it."""
    if not inputs.history or inputs.order == 1:
        return first_order_step(now, target)
    before = inputs.history[0]
    start, end = (level.sigma / level.alpha for level in (now.level, target))
    if start == end:
        return now.x
    # The mean over sigma_ve of its own logarithm, counted from where the step begins.
    mean = end * math.log(end / start) / (end - start) - 1.0
    weight = mean / (now.level.log_snr - before.level.log_snr)
    return step_along_noise(now, target, torch.lerp(now.noise, before.noise, weight))


def unipc_step(now: Evaluation, target: NoiseLevel, inputs: StepInputs) -> Tensor:
    """UniPC of order 2 with B(h) = exp(h) - 1 (arXiv 2302.04867, algorithms 1 to 3): corrects x, then steps.

    The correction uses the x0 that was found at the end of the previous step.
    """
    x = now.x + _unipc_correction(now, inputs.history)
    return first_order_step(replace(now, x=x, x0=_midpoint_x0(now, target, inputs)), target)


def _unipc_correction(now: Evaluation, history: History) -> Tensor | float:
    """The correction of a step's result by the x0 at its end."""
    if not history:
        return 0.0
    before = history[0]
    h = now.level.log_snr - before.level.log_snr
    gain = -now.level.alpha * math.expm1(-h)
    change = now.x0 - before.x0
    if len(history) == 1:
        return gain * 0.5 * change
    r = (history[1].level.log_snr - before.level.log_snr) / h
    slope = (history[1].x0 - before.x0) / r
    # The weights that make both terms exact to second order.
    phi_1 = math.expm1(-h) / -h
    phi_2 = (phi_1 - 1.0) / -h
    b1, b2 = (phi_1 - 1.0) / math.expm1(-h), (2.0 * phi_2 - 1.0) / math.expm1(-h)
    of_slope = (b1 - b2) / (1.0 - r)
    of_change = b1 - of_slope
    return gain * ((of_slope - 0.5) * slope + of_change * change)


def interpolation_weights(points: Sequence[float], start: float, end: float) -> list[float]:
    """The weights of values at `points` in the mean, from start to end, of the polynomial through them."""
    weights = []
    for point in points:
        others = [other for other in points if other != point]
        basis = Polynomial(polyfromroots(others)) / math.prod(point - other for other in others)
        weights.append(float(basis.integ(lbnd=start)(end)) / (end - start))
    return weights
