"""The names of the solvers and their spacings: in this library, in diffusers, and in A1111 and similar programs.

Imports no torch, so that the command and recipes can use it at no cost.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from textwrap import wrap
from typing import Literal

from latentgen.errors import InputError
from latentgen.files import quote

SolverName = Literal[
    "ddpm",
    "ddim",
    "pndm",
    "pndm_prk",
    "euler",
    "euler_ancestral",
    "heun",
    "dpm2",
    "dpm2_ancestral",
    "lms",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "dpmpp_3m",
    "dpmpp_3m_sde",
    "dpmpp_2s",
    "dpmpp_sde",
    "deis",
    "unipc",
    "lcm",
    "tcd",
    "flow_euler",
]
# What may replace a spacing of timesteps: noise levels spaced in sigma_ve, in flow matching in sigma.
Sigmas = Literal["karras", "exponential", "beta", "sgm_uniform", "align_your_steps", "align_your_steps_xl"]


@dataclass(frozen=True)
class SolverNames:
    """A solver: its name in A1111 and recipes, its class in diffusers, which solvers may share, and its use.

    sigmas: those that may replace its spacing of timesteps.
    automatic: those that A1111 uses with the schedule type "Automatic".
    """

    sampler: str
    diffusers_class: str
    good_for: str
    sigmas: tuple[Sigmas, ...] = ()
    automatic: Sigmas | None = None


@dataclass(frozen=True)
class SigmasNames:
    """A spacing in sigma_ve: its name in A1111 and recipes, its flag in diffusers' configs if any, and its use."""

    schedule_type: str
    flag: str | None
    good_for: str


# fmt: off
SIGMAS: dict[Sigmas, SigmasNames] = {
    "karras": SigmasNames("Karras", "use_karras_sigmas",
        "More of the steps at little noise: fine detail in few steps."),
    "exponential": SigmasNames("Exponential", "use_exponential_sigmas",
        "Even in the logarithm of the noise: still more at little noise; for DPM++ 2M SDE and 3M SDE."),
    "beta": SigmasNames("Beta", "use_beta_sigmas",
        "Denser at both ends: composition and detail in few steps."),
    "sgm_uniform": SigmasNames("SGM Uniform", None,
        "Even timesteps that stop short of the end: for Lightning, Turbo and other fast models."),
    "align_your_steps": SigmasNames("Align Your Steps", None,
        "Optimized for SD 1.5 at 10 steps; SDXL pipelines use align_your_steps_xl instead."),
    "align_your_steps_xl": SigmasNames("Align Your Steps XL", None,
        "Optimized for SDXL at 10 steps."),
}
# fmt: on
_ANY: tuple[Sigmas, ...] = tuple(SIGMAS)
# diffusers has no flags for Euler ancestral, and ignores those that other classes left in its file.
_UNFLAGGED: tuple[Sigmas, ...] = tuple(sigmas for sigmas, names in SIGMAS.items() if names.flag is None)

# fmt: off
SOLVER_TABLE: dict[SolverName, SolverNames] = {
    "ddpm": SolverNames("DDPM", "DDPMScheduler",
        "The original DDPM sampling, with fresh noise; needs hundreds of steps."),
    "ddim": SolverNames("DDIM", "DDIMScheduler",
        "Simple and deterministic; for img2img and inversion."),
    "pndm": SolverNames("PLMS", "PNDMScheduler",
        "The default of Stable Diffusion 1.x: better than DDIM from about 20 steps on."),
    "pndm_prk": SolverNames("PNDM PRK", "PNDMScheduler",
        "PLMS that begins with Runge-Kutta steps; nine more calls of the network."),
    "euler": SolverNames("Euler", "EulerDiscreteScheduler",
        "The default of SDXL: robust, settles within 20 to 30 steps.", _ANY),
    "euler_ancestral": SolverNames("Euler a", "EulerAncestralDiscreteScheduler",
        "Fresh noise at each step: soft and varied, and more steps change it.", _UNFLAGGED),
    "heun": SolverNames("Heun", "HeunDiscreteScheduler",
        "Second-order Euler: accurate, at two calls of the network for a step.", _ANY),
    "dpm2": SolverNames("DPM2", "KDPM2DiscreteScheduler",
        "Second order with a midpoint; two calls for a step.", _ANY, "karras"),
    "dpm2_ancestral": SolverNames("DPM2 a", "KDPM2AncestralDiscreteScheduler",
        "DPM2 with fresh noise at each step: detailed and varied; two calls for a step.", _ANY, "karras"),
    "lms": SolverNames("LMS", "LMSDiscreteScheduler",
        "Linear multistep of fourth order: smooth; needs 30 steps or more.", _ANY),
    "dpmpp_2m": SolverNames("DPM++ 2M", "DPMSolverMultistepScheduler",
        "The best to start with: sharp within 20 to 25 steps, best with Karras sigmas.", _ANY, "karras"),
    "dpmpp_2m_sde": SolverNames("DPM++ 2M SDE", "DPMSolverMultistepScheduler",
        "DPM++ 2M with fresh noise: richer texture; needs 25 to 40 steps.", _ANY, "exponential"),
    "dpmpp_3m": SolverNames("DPM++ 3M", "DPMSolverMultistepScheduler",
        "Third order: the most accurate from about 20 steps on, at low guidance.", _ANY),
    "dpmpp_3m_sde": SolverNames("DPM++ 3M SDE", "DPMSolverMultistepScheduler",
        "Third order with fresh noise: fine texture; needs 30 steps or more.", _ANY, "exponential"),
    "dpmpp_2s": SolverNames("DPM++ 2S", "DPMSolverSinglestepScheduler",
        "DPM++ in pairs of steps, without further history; stable at high guidance.", _ANY),
    "dpmpp_sde": SolverNames("DPM++ SDE", "DPMSolverSDEScheduler",
        "Fresh noise, second order: detailed within 10 to 15 steps; two calls for a step.", _ANY, "karras"),
    "deis": SolverNames("DEIS", "DEISMultistepScheduler",
        "Exponential integrator: good within 10 to 20 steps.", _ANY),
    "unipc": SolverNames("UniPC", "UniPCMultistepScheduler",
        "Predictor-corrector: the best where only 5 to 10 steps are affordable.", _ANY),
    "lcm": SolverNames("LCM", "LCMScheduler",
        "For models and LoRAs distilled for it (LCM): 1 to 8 steps."),
    "tcd": SolverNames("TCD", "TCDScheduler",
        "For models and LoRAs distilled for it (TCD, Hyper-SD): 1 to 8 steps."),
    "flow_euler": SolverNames("Flow Euler", "FlowMatchEulerDiscreteScheduler",
        "For models trained by flow matching, and the only one for them; 20 to 30 steps.",
        ("karras", "exponential", "beta")),
}
# fmt: on

# The library's own names: solver, or solver and spacing.
NAMED: dict[str, tuple[SolverName, Sigmas | None]] = {
    f"{solver}_{sigmas}" if sigmas else solver: (solver, sigmas)
    for solver, names in SOLVER_TABLE.items()
    for sigmas in (None, *names.sigmas)
}
SOLVER_NAMES: tuple[str, ...] = tuple(NAMED)

# Own name -> (sampler, schedule type) of A1111 and similar programs.
SAMPLERS: dict[str, tuple[str, str | None]] = {
    name: (SOLVER_TABLE[solver].sampler, SIGMAS[sigmas].schedule_type if sigmas else None)
    for name, (solver, sigmas) in NAMED.items()
}


def _folded(name: str) -> str:
    return " ".join(name.casefold().split())


# All spellings -> own name. Of the solvers that share a class of diffusers, its name means the first.
_SPELLINGS: dict[str, str] = {
    **{names.diffusers_class: solver for solver, names in reversed(SOLVER_TABLE.items())},
    **{" ".join(filter(None, parts)): name for name, parts in SAMPLERS.items()},
    **{name: name for name in NAMED},
}
_FOLDED = {_folded(spelling): spelling for spelling in _SPELLINGS}


def canonical_name(name: str) -> str:
    """The library's name for any known name of a solver; case and extra spaces are ignored.

    Raises InputError for an unknown name, with the nearest known ones.
    """
    folded = _folded(name)
    if folded in _FOLDED:
        return _SPELLINGS[_FOLDED[folded]]
    near = [repr(_FOLDED[item]) for item in difflib.get_close_matches(folded, _FOLDED, n=3)]
    proposal = f"did you mean {' or '.join(near)}? " if near else ""
    raise InputError(f"scheduler {quote(name)} is not known; {proposal}`latentgen schedulers` lists all")


def name_of_sampler(sampler: str, schedule_type: str | None = None) -> str:
    """The library's name for a recipe's "Sampler" and "Schedule type".

    "Automatic" is A1111's choice for the sampler, "Uniform" the sampler's own spacing. Raises InputError for others.
    """
    folded = _folded(schedule_type or "")
    if folded == "automatic":
        own = canonical_name(sampler)
        solver, sigmas = NAMED[own]
        automatic = SOLVER_TABLE[solver].automatic
        return f"{solver}_{automatic}" if automatic and sigmas is None else own
    return canonical_name(sampler if folded in ("", "uniform") else f"{sampler} {schedule_type}")


def listing() -> Iterator[str]:
    """All solvers and spacings by all their names, and what each is good for: lines of at most 100 characters."""
    yield f"{'solver':17}{'A1111':14}diffusers"
    for solver, names in SOLVER_TABLE.items():
        yield f"{solver:17}{names.sampler:14}{names.diffusers_class}"
        yield f"    {names.good_for}"
    yield ""
    yield f"{'spacing':25}{'A1111':20}diffusers"
    for sigmas, spacing in SIGMAS.items():
        yield f"_{sigmas:24}{spacing.schedule_type:20}{spacing.flag or '-'}"
        yield f"    {spacing.good_for}"
    yield ""
    yield 'A spacing follows a solver: dpmpp_2m_karras, or "DPM++ 2M Karras".'
    for spacings in dict.fromkeys(names.sigmas for names in SOLVER_TABLE.values() if names.sigmas):
        solvers = [solver for solver, names in SOLVER_TABLE.items() if names.sigmas == spacings]
        yield from wrap(f"_{', _'.join(spacings)} after {', '.join(solvers)}.", 96, subsequent_indent="    ")
