"""Samplers whose step asks the network once, and puts its answer together with earlier ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from latentgen.diffusion.prediction import from_x0, to_x0
from latentgen.diffusion.schedule import NoiseLevel, NoiseSchedule
from latentgen.diffusion.solvers.step import Evaluation, StepInputs, first_order_step, weighted_sum

# Weights of the latest outputs, the last first, by how many there are.
_ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


def dpmpp_2m_step(now: Evaluation, target: NoiseLevel, inputs: StepInputs) -> Tensor:
    """DPM-Solver++ 2M, midpoint (arXiv 2211.01095, algorithm 2); without a history it is of first order."""
    x0 = now.x0
    if inputs.history and inputs.order > 1:
        before = inputs.history[0]
        stride = target.log_snr - now.level.log_snr
        stride_before = now.level.log_snr - before.level.log_snr
        x0 = torch.lerp(before.x0, x0, 1.0 + 0.5 * stride / stride_before)
    return first_order_step(now._replace(x0=x0), target)


def pndm_step(now: Evaluation, target: NoiseLevel, inputs: StepInputs) -> Tensor:
    """PNDM in its linear multistep form, PLMS (arXiv 2202.09778, algorithm 2): Adams-Bashforth on the raw outputs.

    It is of order 4 after three steps, and of order 2 from the first, which looks at both of its ends.
    """
    outputs = [_output(item, inputs) for item in (now, *inputs.history)]
    if len(outputs) > 1 or inputs.is_last:
        return _along(outputs, _ADAMS_BASHFORTH[len(outputs)], now, target, inputs)
    ahead = inputs.evaluate(first_order_step(now, target), target)
    return _along([*outputs, _output(ahead, inputs)], (1 / 2, 1 / 2), now, target, inputs)


def pndm_prk_step(now: Evaluation, target: NoiseLevel, inputs: StepInputs) -> Tensor:
    """PNDM (arXiv 2202.09778, algorithm 2): three pseudo Runge-Kutta steps, then `pndm_step`."""
    if len(inputs.history) == 3 or inputs.is_last:
        return pndm_step(now, target, inputs)
    middle = prk_middle(now.level, target, inputs.schedule)
    outputs = [_output(now, inputs)]
    for level in (middle, middle, target):
        x = _along(outputs[-1:], (1.0,), now, level, inputs)
        outputs.append(_output(inputs.evaluate(x, level), inputs))
    return _along(outputs, (1 / 6, 1 / 3, 1 / 3, 1 / 6), now, target, inputs)


def prk_middle(level: NoiseLevel, target: NoiseLevel, schedule: NoiseSchedule) -> NoiseLevel:
    """The level at half the timesteps between two."""
    return schedule.level(int(level.timestep - (level.timestep - target.timestep) // 2))


def _output(evaluation: Evaluation, inputs: StepInputs) -> Tensor:
    return from_x0(evaluation.x0, evaluation.x, evaluation.level, inputs.prediction_type)


def _along(
    outputs: Sequence[Tensor],
    weights: Sequence[float],
    now: Evaluation,
    target: NoiseLevel,
    inputs: StepInputs,
) -> Tensor:
    """The first-order step that the network's output would give if it were a weighted sum of several."""
    output = weighted_sum(weights, outputs)
    x0 = to_x0(output, now.x, now.level, inputs.prediction_type)
    return first_order_step(now._replace(x0=x0), target)
