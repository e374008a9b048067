"""The solvers by name: the step of each, and the conventions that the references tie to it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from latentgen.diffusion.schedule import NoiseLevel, Schedule, Spacing
from latentgen.diffusion.solver_names import SolverName
from latentgen.diffusion.solvers.multistep import (
    deis_step,
    dpmpp_2m_sde_step,
    dpmpp_2m_step,
    dpmpp_2s_step,
    dpmpp_3m_sde_step,
    dpmpp_3m_step,
    lms_step,
    pndm_prk_step,
    pndm_step,
    prk_middle,
    unipc_step,
)
from latentgen.diffusion.solvers.one_step import (
    ddpm_step,
    deterministic_step,
    euler_ancestral_step,
    lcm_step,
    tcd_step,
)
from latentgen.diffusion.solvers.step import SolverStep
from latentgen.diffusion.solvers.two_stage import (
    dpm2_ancestral_step,
    dpm2_step,
    dpmpp_sde_step,
    heun_step,
    middle_in_log_sigma,
    same_sigma,
)


@dataclass(frozen=True)
class Solver:
    """A step and its conventions.

    memory: how many earlier evaluations the step uses.
    default_spacing: the spacing where a checkpoint names none.
    fixed_spacing: it is so whatever spacing is asked for; the references know no other.
    in_sigma_ve: the levels are spaced in sigma_ve, so fractional timesteps and other sigmas are possible.
    whole_timesteps: whether the network only sees whole timesteps, where the spacing gives others: "always", or where
        Karras sigmas replace it.
    open_end: the lowest point of the spacing is where the run ends, not a timestep that the network sees.
    scales_start: the initial noise is scaled by sigma, not by 1, unless the spacing is `leading`.
    distilled: the timesteps are among those of a distillation, original_inference_steps, whatever the spacing.
    end: the field of the config that may move the end of a run from clean data to the schedule's first level, or
        "first_level" where it always lies there.
    midpoint: where a step looks on its way from one level to another, besides at these, if it does.
    lowers_below: in runs of fewer steps than this the order falls to 1 towards the end, unless lower_order_final is
        false.
    lowers_at_clean_end: the last step is of first order where it ends in clean data, or euler_at_final asks for it.
    clips, thresholds: which bounds apply to x0.
    keeps_noise: the bounds leave noise_hat as the network predicted it.
    flow: it samples models of a FlowSchedule, and no others.
    """

    step: SolverStep
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


SOLVERS: dict[SolverName, Solver] = {
    "ddpm": Solver(ddpm_step, "leading", whole_timesteps="always", clips=True, thresholds=True),
    "ddim": Solver(
        deterministic_step,
        "leading",
        whole_timesteps="always",
        end="set_alpha_to_one",
        clips=True,
        thresholds=True,
        keeps_noise=True,
    ),
    "euler": Solver(
        deterministic_step,
        "linspace",
        in_sigma_ve=True,
        scales_start=True,
        end="final_sigmas_type",
    ),
    "euler_ancestral": Solver(
        euler_ancestral_step,
        "linspace",
        in_sigma_ve=True,
        scales_start=True,
    ),
    "heun": Solver(
        heun_step,
        "linspace",
        in_sigma_ve=True,
        scales_start=True,
        clips=True,
    ),
    "dpm2": Solver(
        dpm2_step,
        "linspace",
        in_sigma_ve=True,
        whole_timesteps="karras",
        scales_start=True,
        midpoint=middle_in_log_sigma,
    ),
    "dpm2_ancestral": Solver(
        dpm2_ancestral_step,
        "linspace",
        in_sigma_ve=True,
        whole_timesteps="karras",
        scales_start=True,
        midpoint=same_sigma,
    ),
    "lms": Solver(
        lms_step,
        "linspace",
        memory=3,
        in_sigma_ve=True,
        scales_start=True,
    ),
    "dpmpp_2m": Solver(
        dpmpp_2m_step,
        "linspace",
        memory=1,
        in_sigma_ve=True,
        whole_timesteps="always",
        open_end=True,
        end="final_sigmas_type",
        lowers_below=15,
        lowers_at_clean_end=True,
        thresholds=True,
    ),
    "dpmpp_2m_sde": Solver(
        dpmpp_2m_sde_step,
        "linspace",
        memory=1,
        in_sigma_ve=True,
        whole_timesteps="always",
        open_end=True,
        end="final_sigmas_type",
        lowers_below=15,
        lowers_at_clean_end=True,
        thresholds=True,
    ),
    "dpmpp_3m": Solver(
        dpmpp_3m_step,
        "linspace",
        memory=2,
        in_sigma_ve=True,
        whole_timesteps="always",
        open_end=True,
        end="final_sigmas_type",
        lowers_below=15,
        lowers_at_clean_end=True,
        thresholds=True,
    ),
    "dpmpp_3m_sde": Solver(
        dpmpp_3m_sde_step,
        "linspace",
        memory=2,
        in_sigma_ve=True,
        whole_timesteps="always",
        open_end=True,
        end="final_sigmas_type",
        lowers_below=15,
        lowers_at_clean_end=True,
        thresholds=True,
    ),
    "pndm": Solver(pndm_step, "leading", memory=3, whole_timesteps="always", end="set_alpha_to_one"),
    "pndm_prk": Solver(
        pndm_prk_step,
        "leading",
        memory=3,
        whole_timesteps="always",
        end="set_alpha_to_one",
        midpoint=prk_middle,
    ),
    "dpmpp_2s": Solver(
        dpmpp_2s_step,
        "linspace",
        fixed_spacing=True,
        memory=1,
        in_sigma_ve=True,
        whole_timesteps="always",
        open_end=True,
        end="final_sigmas_type",
        lowers_below=math.inf,
        lowers_at_clean_end=True,
        thresholds=True,
    ),
    "dpmpp_sde": Solver(
        dpmpp_sde_step,
        "linspace",
        in_sigma_ve=True,
        scales_start=True,
        midpoint=middle_in_log_sigma,
    ),
    "deis": Solver(
        deis_step,
        "linspace",
        memory=1,
        in_sigma_ve=True,
        whole_timesteps="always",
        open_end=True,
        end="first_level",
        lowers_below=15,
        thresholds=True,
    ),
    "unipc": Solver(
        unipc_step,
        "linspace",
        memory=2,
        in_sigma_ve=True,
        whole_timesteps="always",
        open_end=True,
        end="final_sigmas_type",
        lowers_below=math.inf,
        lowers_at_clean_end=True,
        thresholds=True,
    ),
    "lcm": Solver(lcm_step, "leading", distilled=True, clips=True, thresholds=True),
    "tcd": Solver(tcd_step, "leading", distilled=True, end="first_level"),
    "flow_euler": Solver(deterministic_step, "linspace", fixed_spacing=True, flow=True),
}
