"""The solvers by name: the step of each, and its conventions in the reference implementations."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from latentgen.diffusion.flow_matching import Schedule
from latentgen.diffusion.schedule import NoiseLevel, Spacing
from latentgen.diffusion.solver_names import SolverName
from latentgen.diffusion.solvers import multistep, single_step


@dataclass(frozen=True)
class Solver:
    """A step and its conventions.

    default_spacing: of checkpoints that name none.
    fixed_spacing: always the default, as in the references.
    memory: how many earlier evaluations the step uses.
    in_sigma_ve: the levels are spaced in sigma_ve, so fractional timesteps and other sigmas are possible.
    whole_timesteps: when fractional timesteps are rounded: "always", or only with Karras sigmas ("karras").
    open_end: the lowest point of the spacing is the final level, where the network is not evaluated.
    scales_start: the initial noise is scaled by sigma, not by 1, unless the spacing is `leading`.
    distilled: the timesteps are among those of a distillation, original_inference_steps, whatever the spacing.
    end: the field of the config that may move the final level from clean data to the schedule's first level, or
        "first_level" for always.
    midpoint: the level between two others at which a step evaluates the network, too, if any.
    lowers_below: in runs of fewer steps the order falls to 1 towards the end, unless lower_order_final is false.
    lowers_at_clean_end: the last step is of first order if it ends in clean data, or with euler_at_final.
    clips, thresholds: which bounds apply to x0.
    keeps_noise: the bounds do not change noise_hat.
    flow: for models with a FlowSchedule only.
    """

    step: single_step.SolverStep
    default_spacing: Spacing
    fixed_spacing: bool = False
    memory: int = 0
    in_sigma_ve: bool = False
    whole_timesteps: Literal["never", "karras", "always"] = "never"
    open_end: bool = False
    scales_start: bool = False
    distilled: bool = False
    end: Literal["set_alpha_to_one", "final_sigmas_type", "first_level"] | None = None
    midpoint: Callable[[NoiseLevel, NoiseLevel, Schedule], NoiseLevel] | None = None
    lowers_below: float = 0
    lowers_at_clean_end: bool = False
    clips: bool = False
    thresholds: bool = False
    keeps_noise: bool = False
    flow: bool = False


# The conventions that several solvers share; the rows below state the differences.
_DISCRETE = Solver(single_step.euler_step, "leading", whole_timesteps="always", clips=True, thresholds=True)
_K_DIFFUSION = Solver(single_step.euler_step, "linspace", in_sigma_ve=True, scales_start=True)
_DPMPP = Solver(
    multistep.dpmpp_2m_step,
    "linspace",
    memory=1,
    in_sigma_ve=True,
    whole_timesteps="always",
    open_end=True,
    end="final_sigmas_type",
    lowers_below=15,
    lowers_at_clean_end=True,
    thresholds=True,
)
_DPM2 = replace(
    _K_DIFFUSION,
    step=single_step.dpm2_step,
    whole_timesteps="karras",
    midpoint=single_step.middle_in_log_sigma,
)
_PNDM = Solver(multistep.pndm_step, "leading", memory=3, whole_timesteps="always", end="set_alpha_to_one")

SOLVERS: dict[SolverName, Solver] = {
    "ddpm": replace(_DISCRETE, step=single_step.ddpm_step),
    "ddim": replace(_DISCRETE, end="set_alpha_to_one", keeps_noise=True),
    "euler": replace(_K_DIFFUSION, end="final_sigmas_type"),
    "euler_ancestral": replace(_K_DIFFUSION, step=single_step.euler_ancestral_step),
    "heun": replace(_K_DIFFUSION, step=single_step.heun_step, clips=True),
    "dpm2": _DPM2,
    "dpm2_ancestral": replace(_DPM2, step=single_step.dpm2_ancestral_step, midpoint=single_step.same_sigma),
    "lms": replace(_K_DIFFUSION, step=multistep.lms_step, memory=3),
    "dpmpp_2m": _DPMPP,
    "dpmpp_2m_sde": replace(_DPMPP, step=multistep.dpmpp_2m_sde_step),
    "dpmpp_3m": replace(_DPMPP, step=multistep.dpmpp_3m_step, memory=2),
    "dpmpp_3m_sde": replace(_DPMPP, step=multistep.dpmpp_3m_sde_step, memory=2),
    "pndm": _PNDM,
    "pndm_prk": replace(_PNDM, step=multistep.pndm_prk_step, midpoint=multistep.prk_middle),
    "dpmpp_2s": replace(_DPMPP, step=multistep.dpmpp_2s_step, fixed_spacing=True, lowers_below=math.inf),
    "dpmpp_sde": replace(
        _K_DIFFUSION, step=single_step.dpmpp_sde_step, midpoint=single_step.middle_in_log_sigma
    ),
    "deis": replace(_DPMPP, step=multistep.deis_step, end="first_level", lowers_at_clean_end=False),
    "unipc": replace(_DPMPP, step=multistep.unipc_step, memory=2, lowers_below=math.inf),
    "lcm": Solver(single_step.lcm_step, "leading", distilled=True, clips=True, thresholds=True),
    "tcd": Solver(single_step.tcd_step, "leading", distilled=True, end="first_level"),
    "flow_euler": Solver(single_step.euler_step, "linspace", fixed_spacing=True, flow=True),
}
