"""The scheduler that nearly every Stable Diffusion 1.x folder names, against diffusers."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from latentgen.checkpoints.families import FAMILIES
from latentgen.pipelines.text_to_image import TextToImagePipeline
from tests.conftest import build_pipeline

PROMPTS = ["a cat", "tiger, red dog"]
SEEDS = (7, 8)


def save_with(scheduler: dict[str, Any], folder: Path) -> Path:
    pipeline = build_pipeline()
    pipeline.scheduler = diffusers.PNDMScheduler()
    pipeline.save_pretrained(folder, safe_serialization=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    return folder


@pytest.mark.parametrize(
    ("changes", "num_steps", "solver"),
    [
        ({}, 1, "pndm"),
        ({}, 2, "pndm"),
        ({}, 10, "pndm"),
        ({"prediction_type": "v_prediction"}, 10, "pndm"),
        ({"skip_prk_steps": False}, 10, "pndm_prk"),
    ],
)
def test_stable_diffusion_1_gives_the_image_of_diffusers(
    changes: dict[str, Any], num_steps: int, solver: str, tmp_path: Path
) -> None:
    folder = save_with(FAMILIES["SD 1.x"].component_configs("epsilon")["scheduler"] | changes, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        ours = TextToImagePipeline.from_pretrained(folder, dtype="float32", device="cpu")
    assert ours.scheduler.name == solver
    steps = list(
        ours.stream(PROMPTS, seed=SEEDS, num_inference_steps=num_steps, output_type="np", progress=False)
    )
    assert len(steps) == num_steps
    images = steps[-1].images()

    oracle = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    oracle.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    theirs = oracle(PROMPTS, generator=generators, num_inference_steps=num_steps, output_type="np").images
    assert np.abs(np.asarray(images) - theirs).max() <= 1e-4
