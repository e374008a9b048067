"""The sampling loop next to diffusers', around identity networks: what a step costs apart from the network.

    python -m benchmarks.loop [--solvers euler ddim] [--rounds 9]

Both pipelines run whole on the CPU, text encoder included, with classifier-free guidance and latents of 64x64; the time
of a step is the difference between a run of many steps and one of few. It is the processor's time, in which a busy
machine hardly shows. Noise for the stochastic solvers is drawn by the same generator in both, which is most of what
their steps take: it is listed apart. Exits with 1 where the rest of a step takes more than half of diffusers' time.
Needs the `dev` extra.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from functools import partial
from typing import Any

import diffusers
import torch
from torch import Tensor

from benchmarks.timing import interleaved
from latentgen import from_diffusers, to_diffusers
from latentgen.diffusion.scheduler import Scheduler
from latentgen.diffusion.solver_names import SOLVER_NAMES, SOLVER_TABLE
from latentgen.diffusion.solvers.single_step import TCD_GAMMA
from latentgen.models.attention import ContextKeyValue
from latentgen.models.unet import UNetConstants
from latentgen.pipelines.base import Pipeline
from tests.conftest import build_pipeline

LIMIT = 0.5
FEW, MANY, DISTILLED = 5, 205, 250
SIZE = 128  # the latents of 512 pixels: the tiny VAE halves twice less than that of Stable Diffusion
PROMPT = "a cat"
# How often a step draws noise.
STOCHASTIC = dict.fromkeys(
    ("ddpm", "euler_ancestral", "dpm2_ancestral", "dpmpp_2m_sde", "dpmpp_3m_sde", "lcm", "tcd"), 1
) | {"dpmpp_sde": 2}
# Without, diffusers' pipelines leave out the noise that makes TCD what it is.
DIFFUSERS_OPTIONS: dict[str, dict[str, float]] = {"tcd": {"eta": TCD_GAMMA}}


def main() -> int:
    """Time a step of every solver and print the ratios."""
    arguments = _arguments()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # towards which networks that do nothing may lead
    worst, draw = 0.0, _microseconds_of_a_draw(arguments.rounds)
    print(f"microseconds of the processor a step, {arguments.rounds} rounds, float32, 1 thread")
    diffusers.utils.logging.set_verbosity_error()
    for name in arguments.solvers:
        try:
            ours, theirs = _microseconds(name, arguments.rounds)
        except ImportError as error:
            print(
                f"  {name:24} diffusers has it only with another package: {' '.join(str(error).split())[:80]}"
            )
            continue
        drawing = draw * STOCHASTIC.get(name, 0)
        ratio = (ours - drawing) / (theirs - drawing)
        worst = max(worst, ratio)
        of_noise = f"   of which noise {drawing:4.0f}" if drawing else ""
        print(f"  {name:24} latentgen {ours:5.0f}   diffusers {theirs:5.0f}   ratio {ratio:.2f}{of_noise}")
    print(f"largest ratio {worst:.2f}, allowed {LIMIT}")
    return int(worst > LIMIT)


def _microseconds(solver: str, rounds: int) -> tuple[float, float]:
    """What a step of one solver takes here, and in diffusers."""
    ours = from_diffusers(build_pipeline())
    # As many as a model for LCM or TCD could be distilled on.
    scheduler = replace(ours.scheduler.with_solver(solver), original_inference_steps=DISTILLED)
    theirs = to_diffusers(_with_scheduler(ours, scheduler))
    theirs.set_progress_bar_config(disable=True)
    # What is constant over a run belongs to the network, too.
    ours.unet.constants = lambda context, *arguments, **keywords: _rows(len(context))
    ours.unet.step = _identity
    theirs.unet.forward = lambda sample, *arguments, **keywords: (sample,)
    given: dict[str, Any] = {"height": SIZE, "width": SIZE, "output_type": "latent"}
    work = {}
    for steps in (FEW, MANY):
        work[f"ours {steps}"] = partial(
            ours, PROMPT, seed=7, scheduler=scheduler, num_inference_steps=steps, progress=False, **given
        )
        options = DIFFUSERS_OPTIONS.get(solver, {})
        work[f"theirs {steps}"] = partial(theirs, PROMPT, num_inference_steps=steps, **given, **options)
    least = interleaved(work, rounds, time.process_time, min)
    times = [(least[f"{who} {MANY}"] - least[f"{who} {FEW}"]) / (MANY - FEW) for who in ("ours", "theirs")]
    return times[0] * 1e6, times[1] * 1e6


def _microseconds_of_a_draw(rounds: int) -> float:
    generator = torch.Generator().manual_seed(7)

    def draws() -> None:
        for _ in range(MANY):
            torch.randn(1, 4, 64, 64, generator=generator)

    return interleaved({"draw": draws}, rounds, time.process_time, min)["draw"] / MANY * 1e6


def _rows(count: int) -> UNetConstants:
    """Constants that tell nothing but how many rows there are."""
    pair = (torch.zeros(count, 1, 1), torch.zeros(count, 1, 1))
    return UNetConstants(times=(), contexts=((ContextKeyValue(None, pair),),))


def _identity(sample: Tensor, constants: UNetConstants, index: int) -> Tensor:
    """In the place of UNet.step: every row gives back the latents."""
    rows = constants.contexts[0][0].attn2[0].shape[0]
    return torch.cat([sample] * (rows // sample.shape[0]))


def _with_scheduler(pipeline: Pipeline, scheduler: Scheduler) -> Pipeline:
    return replace(pipeline, scheduler=scheduler)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="the sampling loop of latentgen next to diffusers'")
    # That of flow matching wants a model of its own; its step is Euler's.
    usual = [name for name in SOLVER_TABLE if name != "flow_euler"]
    parser.add_argument("--solvers", nargs="+", default=usual, choices=SOLVER_NAMES)
    parser.add_argument("--rounds", type=int, default=9)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
