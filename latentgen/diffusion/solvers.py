"""The samplers, as pure steps from one noise level to the next.

One step covers a family. With ``u = eta * (sigma' / sigma) * sqrt(1 - alpha**2 / alpha'**2)``,

    x' = alpha' * x0 + sqrt(sigma'**2 - u**2) * noise_hat + u * z,    noise_hat = (x - alpha * x0) / sigma

is DDIM for any eta (arXiv 2010.02502, eq. 12 and 16), DDPM with its small variance (arXiv 2006.11239, eq. 6
and 7) and Euler ancestral at eta 1, Euler (arXiv 2206.00364, algorithm 1) at eta 0: they differ in the levels
that they visit, not in the step. LCM and TCD are this step with a u of their own, DPM++ 2M is it along an x0
extrapolated from the last two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from latentgen.diffusion.prediction import PredictionType, from_x0, to_x0
from latentgen.diffusion.schedule import NoiseLevel, NoiseSchedule, Spacing

SolverName = Literal["ddpm", "ddim", "euler", "euler_ancestral", "dpmpp_2m", "pndm", "pndm_prk", "lcm", "tcd"]

# How much of the noise that TCD ends up with is fresh: what its paper finds best for few steps, of 0..1.
TCD_GAMMA = 0.3

_SIGMA_DATA = 0.5

# Weights of the latest outputs, the last first, by how many there are.
_ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


class Evaluation(NamedTuple):
    """What the network said of x at one noise level: x and x0 are [B, C, H, W]."""

    level: NoiseLevel
    x: Tensor
    x0: Tensor


# Earlier evaluations of a run, the latest first: the whole memory of a multistep solver.
History = tuple[Evaluation, ...]


@dataclass(frozen=True)
class StepInputs:
    """What a step may use besides where it stands and where it goes.

    history: earlier evaluations, as many as the solver's `memory`, fewer where a run begins.
    is_last: the run ends at the target; the network has no say there.
    evaluate: asks the network once more, of any x at the target or at the solver's level between.
    draw: gives fresh standard normal noise, shaped like x.
    schedule, prediction_type, timestep_scaling: of the Scheduler.
    """

    history: History
    is_last: bool
    evaluate: Callable[[Tensor, NoiseLevel], Evaluation]
    draw: Callable[[], Tensor]
    schedule: NoiseSchedule
    prediction_type: PredictionType
    timestep_scaling: float


# The evaluation where the step begins, the level where it ends -> x at that level.
SolverStep = Callable[[Evaluation, NoiseLevel, StepInputs], Tensor]


def fresh_noise_scale(level: NoiseLevel, target: NoiseLevel, eta: float) -> float:
    """The standard deviation u of the fresh noise in a step from level to target; 0 for eta 0."""
    remaining = max(0.0, 1.0 - (level.alpha / target.alpha) ** 2)
    return eta * (target.sigma / level.sigma) * math.sqrt(remaining)


def first_order_step(
    x: Tensor,
    x0: Tensor,
    level: NoiseLevel,
    target: NoiseLevel,
    fresh: float = 0.0,
    noise: Tensor | None = None,
) -> Tensor:
    """One step from level to target along the predicted x0; finite at zero signal-to-noise ratio.

    x, x0 and noise are [B, C, H, W]; noise is standard normal, and counts for its standard deviation `fresh`.
    """
    keep = math.sqrt(max(0.0, target.sigma**2 - fresh**2)) / level.sigma
    moved = torch.add(keep * x, x0, alpha=target.alpha - level.alpha * keep)
    if noise is None or fresh == 0.0:
        return moved
    return torch.add(moved, noise, alpha=fresh)


def deterministic_step(now: Evaluation, target: NoiseLevel, inputs: StepInputs) -> Tensor:
    """DDIM at eta 0, and Euler."""
    return first_order_step(now.x, now.x0, now.level, target)


def ddpm_step(now: Evaluation, target: NoiseLevel, inputs: StepInputs) -> Tensor:
    """DDPM, which draws nothing at timestep 0."""
    noise = inputs.draw() if now.level.timestep > 0.0 else None
    fresh = fresh_noise_scale(now.level, target, eta=1.0)
    return first_order_step(now.x, now.x0, now.level, target, fresh, noise)


def euler_ancestral_step(now: Evaluation, target: NoiseLevel, inputs: StepInputs) -> Tensor:
    """Euler ancestral, which draws even where it ends in clean data and has no use for it."""
    fresh = fresh_noise_scale(now.level, target, eta=1.0)
    return first_order_step(now.x, now.x0, now.level, target, fresh, inputs.draw())


def dpmpp_2m_step(now: Evaluation, target: NoiseLevel, inputs: StepInputs) -> Tensor:
    """DPM-Solver++ 2M, midpoint (arXiv 2211.01095, algorithm 2); without a history it is of first order."""
    x0 = now.x0
    if inputs.history:
        before = inputs.history[0]
        stride = target.log_snr - now.level.log_snr
        stride_before = now.level.log_snr - before.level.log_snr
        x0 = torch.lerp(before.x0, x0, 1.0 + 0.5 * stride / stride_before)
    return first_order_step(now.x, x0, now.level, target)


def pndm_step(now: Evaluation, target: NoiseLevel, inputs: StepInputs) -> Tensor:
    """PNDM in its linear multistep form, PLMS (arXiv 2202.09778, algorithm 2): Adams-Bashforth on the raw outputs.

    It is of order 4 after three steps, and of order 2 from the first, which looks at both of its ends.
    """
    outputs = [_output(item, inputs) for item in (now, *inputs.history)]
    if len(outputs) > 1 or inputs.is_last:
        return _along(outputs, _ADAMS_BASHFORTH[len(outputs)], now, target, inputs)
    ahead = inputs.evaluate(first_order_step(now.x, now.x0, now.level, target), target)
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
    output = weights[0] * outputs[0]
    for weight, other in zip(weights[1:], outputs[1:], strict=True):
        output = torch.add(output, other, alpha=weight)
    x0 = to_x0(output, now.x, now.level, inputs.prediction_type)
    return first_order_step(now.x, x0, now.level, target)


def lcm_step(now: Evaluation, target: NoiseLevel, inputs: StepInputs) -> Tensor:
    """Latent consistency models (arXiv 2310.04378): to x0 at once, and back up with nothing but fresh noise.

    A skip connection makes x0 of x at timestep 0; its sigma_data is 0.5.
    """
    scaled = now.level.timestep * inputs.timestep_scaling
    skip = _SIGMA_DATA**2 / (scaled**2 + _SIGMA_DATA**2)
    x0 = torch.add(skip * now.x, now.x0, alpha=math.sqrt(1.0 - skip))
    noise = None if inputs.is_last else inputs.draw()
    return first_order_step(now.x, x0, now.level, target, target.sigma, noise)


def tcd_step(now: Evaluation, target: NoiseLevel, inputs: StepInputs) -> Tensor:
    """Trajectory consistency distillation (arXiv 2402.19159): to (1 - gamma) of the target's timestep, and back up."""
    below = inputs.schedule.level(int((1.0 - TCD_GAMMA) * target.timestep))
    fresh = math.sqrt(1.0 - (target.alpha / below.alpha) ** 2)
    noise = None if inputs.is_last else inputs.draw()
    return first_order_step(now.x, now.x0, now.level, target, fresh, noise)


@dataclass(frozen=True)
class Solver:
    """A step, and the conventions that the references tie to it.

    memory: how many earlier evaluations the step uses.
    default_spacing: the spacing where a checkpoint names none.
    in_sigma_ve: the levels are spaced in sigma_ve, so fractional timesteps and Karras sigmas are possible.
    whole_timesteps: the network only sees whole timesteps.
    open_end: the lowest point of the spacing is where the run ends, not a timestep that the network sees.
    scales_start: the initial noise is scaled by sigma, not by 1, unless the spacing is `leading`.
    distilled: the timesteps are among those of a distillation, original_inference_steps, whatever the spacing.
    end: the field of the config that may move the end of a run from clean data to the schedule's first level, or
        "first_level" where it always lies there.
    karras: Karras sigmas may replace the spacing.
    between: where a step looks on its way from one level to another, besides at these, if it does.
    lower_order_end: the last step may have to do without a history, to be one of first order.
    clips, thresholds: which bounds apply to x0.
    keeps_noise: the bounds leave noise_hat as the network predicted it.
    """

    step: SolverStep
    default_spacing: Spacing
    memory: int = 0
    in_sigma_ve: bool = False
    whole_timesteps: bool = True
    open_end: bool = False
    scales_start: bool = False
    distilled: bool = False
    end: Literal["set_alpha_to_one", "final_sigmas_type", "first_level"] | None = None
    karras: bool = False
    between: Callable[[NoiseLevel, NoiseLevel, NoiseSchedule], NoiseLevel] | None = None
    lower_order_end: bool = False
    clips: bool = False
    thresholds: bool = False
    keeps_noise: bool = False


SOLVERS: dict[SolverName, Solver] = {
    "ddpm": Solver(ddpm_step, "leading", clips=True, thresholds=True),
    "ddim": Solver(
        deterministic_step, "leading", end="set_alpha_to_one", clips=True, thresholds=True, keeps_noise=True
    ),
    "euler": Solver(
        deterministic_step,
        "linspace",
        in_sigma_ve=True,
        whole_timesteps=False,
        scales_start=True,
        end="final_sigmas_type",
        karras=True,
    ),
    "euler_ancestral": Solver(
        euler_ancestral_step,
        "linspace",
        in_sigma_ve=True,
        whole_timesteps=False,
        scales_start=True,
    ),
    "dpmpp_2m": Solver(
        dpmpp_2m_step,
        "linspace",
        memory=1,
        in_sigma_ve=True,
        open_end=True,
        end="final_sigmas_type",
        karras=True,
        lower_order_end=True,
        thresholds=True,
    ),
    "pndm": Solver(pndm_step, "leading", memory=3, end="set_alpha_to_one"),
    "pndm_prk": Solver(pndm_prk_step, "leading", memory=3, end="set_alpha_to_one", between=prk_middle),
    "lcm": Solver(lcm_step, "leading", distilled=True, clips=True, thresholds=True),
    "tcd": Solver(tcd_step, "leading", distilled=True, end="first_level"),
}
