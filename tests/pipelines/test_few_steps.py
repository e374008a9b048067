"""Models for one to four steps against diffusers: SD-Turbo, SDXL-Turbo and LCM in few channels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest

from latentgen.pipelines.text_to_image import TextToImagePipeline
from tests.conftest import build_pipeline
from tests.pipelines.drawing import PROMPTS, SEEDS, difference, draw, draw_theirs
from tests.pipelines.sdxl import build_base

# What differs in the scheduler_config.json of SD-Turbo from the defaults; that of SDXL-Turbo names another class.
TURBO = {
    "_class_name": "EulerDiscreteScheduler",
    "_diffusers_version": "0.24.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "trailing",
}
# The same of LCM_Dreamshaper_v7.
LCM = {
    "_class_name": "LCMScheduler",
    "_diffusers_version": "0.22.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "original_inference_steps": 50,
}


def save(pipeline: Any, folder: Path, scheduler: dict[str, Any]) -> Path:
    pipeline.scheduler = getattr(diffusers, scheduler["_class_name"])()
    pipeline.save_pretrained(folder, safe_serialization=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    return folder


@pytest.fixture(scope="module")
def sd_turbo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pipeline = build_pipeline(use_linear_projection=True, attention_head_dim=(2, 4))
    return save(pipeline, tmp_path_factory.mktemp("sd-turbo"), TURBO)


@pytest.fixture(scope="module")
def sdxl_turbo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    scheduler = TURBO | {"_class_name": "EulerAncestralDiscreteScheduler"}
    return save(build_base(), tmp_path_factory.mktemp("sdxl-turbo"), scheduler)


def assert_same_images(folder: Path, **arguments: Any) -> None:
    ours = TextToImagePipeline.from_pretrained(folder, dtype="float32", device="cpu")
    oracle = diffusers.DiffusionPipeline.from_pretrained(folder)
    expected = draw_theirs(oracle, PROMPTS, SEEDS, **arguments)
    assert difference(draw(ours, PROMPTS, seed=SEEDS, **arguments), expected) <= 1e-4


@pytest.mark.parametrize("num_steps", [1, 2, 4])
@pytest.mark.parametrize("family", ["sd_turbo", "sdxl_turbo"])
def test_turbo_gives_the_image_of_diffusers(
    family: str, num_steps: int, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(family)
    assert_same_images(folder, guidance_scale=0.0, num_inference_steps=num_steps)


@pytest.fixture(scope="module")
def lcm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pipeline = build_pipeline(time_cond_proj_dim=256)
    return save(pipeline, tmp_path_factory.mktemp("lcm"), LCM)


def test_a_latent_consistency_model_gives_the_image_of_diffusers(lcm: Path) -> None:
    """The guidance scale is an input, without a second, unconditional output."""
    assert_same_images(lcm, guidance_scale=8.5, num_inference_steps=4)
