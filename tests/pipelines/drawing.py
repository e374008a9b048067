"""Small images, calls of our pipelines and of diffusers' with the same arguments, and the difference of results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image

PROMPTS = ["a cat", "tiger, red dog"]
SEEDS = (7, 8)
# Solver -> the scheduler of diffusers with the same steps.
SCHEDULERS: dict[str, tuple[type, dict[str, object]]] = {
    "ddpm": (diffusers.DDPMScheduler, {}),
    "ddim": (diffusers.DDIMScheduler, {"clip_sample": False}),
    "pndm": (diffusers.PNDMScheduler, {"skip_prk_steps": True}),
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "euler_ancestral": (diffusers.EulerAncestralDiscreteScheduler, {}),
    "heun": (diffusers.HeunDiscreteScheduler, {}),
    "dpm2_karras": (diffusers.KDPM2DiscreteScheduler, {"use_karras_sigmas": True}),
    "dpm2_ancestral": (diffusers.KDPM2AncestralDiscreteScheduler, {}),
    "dpmpp_2m": (diffusers.DPMSolverMultistepScheduler, {}),
    "dpmpp_2m_karras": (diffusers.DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "dpmpp_2m_sde": (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "dpmpp_2s": (diffusers.DPMSolverSinglestepScheduler, {}),
    "deis": (diffusers.DEISMultistepScheduler, {}),
    "unipc": (diffusers.UniPCMultistepScheduler, {}),
    "lcm": (diffusers.LCMScheduler, {}),
}


def picture(seed: int, width: int = 16, height: int = 16) -> Image.Image:
    """Random pixels."""
    levels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(levels)


PICTURES = [picture(0), picture(1)]


def draw(pipeline: Any, prompt: str | list[str] = "a cat", **options: Any) -> np.ndarray:
    """The images of our pipeline, [B, H, W, 3]; four steps and seed 7 unless `options` has others."""
    defaults = {"num_inference_steps": 4, "seed": 7, "output_type": "np", "progress": False}
    return np.asarray(pipeline(prompt, **defaults | options).images)


def draw_theirs(
    pipe: Any, prompt: str | list[str] = "a cat", seeds: Sequence[int] = (7,), **options: Any
) -> np.ndarray:
    """The images of a pipeline of diffusers with the same arguments."""
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    defaults = {"num_inference_steps": 4, "output_type": "np", "generator": generators}
    return np.asarray(pipe(prompt, **defaults | options).images)


def with_solver(pipe: Any, name: str) -> Any:
    """A pipeline of diffusers with another scheduler, one of SCHEDULERS."""
    kind, options = SCHEDULERS[name]
    own = ("force_zeros_for_empty_prompt", "requires_aesthetics_score", "requires_safety_checker")
    config = {key: pipe.config[key] for key in own if key in pipe.config}
    if "XL" in type(pipe).__name__:
        config["add_watermarker"] = False
    parts = {**pipe.components, "scheduler": kind.from_config(pipe.scheduler.config, **options)}  # type: ignore[attr-defined]
    return type(pipe)(**parts, **config)


def difference(ours: Any, theirs: Any) -> float:
    """The largest difference between results of one shape."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max())
