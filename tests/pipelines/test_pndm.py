"""The scheduler that nearly every Stable Diffusion 1.x folder names, against diffusers."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import diffusers
import pytest

from latentgen.checkpoints.families import FAMILIES
from latentgen.pipelines.text_to_image import TextToImagePipeline
from tests.conftest import build_pipeline
from tests.pipelines.drawing import PROMPTS, SEEDS, difference, draw, draw_theirs


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
    options = {"num_inference_steps": num_steps, "progress": False}
    assert len(list(ours.stream(PROMPTS, **options))) == num_steps  # type: ignore[arg-type]
    oracle = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    theirs = draw_theirs(oracle, PROMPTS, SEEDS, num_inference_steps=num_steps)
    assert difference(draw(ours, PROMPTS, num_inference_steps=num_steps), theirs) <= 1e-4
