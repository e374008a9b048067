"""A UNet as if trained by flow matching, against diffusers, whose pipeline takes its scheduler with a little help."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusionPipeline

from latentgen import cli, to_diffusers
from latentgen.checkpoints.convert import convert
from latentgen.diffusion.flow_matching import FlowSchedule
from latentgen.errors import ConfigError
from latentgen.pipelines.guidance_options import GuidanceOptions
from latentgen.pipelines.text_to_image import TextToImagePipeline
from tests.conftest import build_pipeline
from tests.pipelines import drawing
from tests.pipelines.drawing import PROMPTS, SEEDS

SHIFT = 3.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pipeline = build_pipeline()
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    pipeline.save_pretrained(path := tmp_path_factory.mktemp("flow"), safe_serialization=True)
    return path


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> TextToImagePipeline:
    return TextToImagePipeline.from_pretrained(folder, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def oracle(folder: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)


def draw(pipeline: TextToImagePipeline, **options: Any) -> np.ndarray:
    return drawing.draw(pipeline, PROMPTS, **options)


def draw_theirs(pipeline: Any, **options: Any) -> np.ndarray:
    # The latents of its own pipelines are not scaled; this one asks.
    pipeline.scheduler.init_noise_sigma = 1.0
    return drawing.draw_theirs(pipeline, PROMPTS, SEEDS, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_inference_steps": 1, "guidance_scale": 1.0},
        {"num_inference_steps": 20},
        {"sigmas": [1.0, 0.7, 0.2]},
    ],
)
def test_gives_the_image_of_diffusers(
    pipeline: TextToImagePipeline, oracle: StableDiffusionPipeline, options: dict[str, Any]
) -> None:
    assert np.abs(draw(pipeline, **options) - draw_theirs(oracle, **options)).max() <= 1e-4


@pytest.mark.parametrize("flag", ["use_karras_sigmas", "use_exponential_sigmas"])
def test_a_scheduler_of_diffusers_is_taken(pipeline: TextToImagePipeline, folder: Path, flag: str) -> None:
    theirs = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    theirs.scheduler = FlowMatchEulerDiscreteScheduler.from_config(theirs.scheduler.config, **{flag: True})
    ours = draw(pipeline, scheduler=theirs.scheduler)
    assert np.abs(ours - draw_theirs(theirs)).max() <= 1e-4
    name = "Flow Euler Karras" if flag == "use_karras_sigmas" else "flow_euler_exponential"
    assert np.array_equal(ours, draw(pipeline, scheduler=name))


def test_goes_back_to_diffusers(pipeline: TextToImagePipeline, tmp_path: Path) -> None:
    again: Any = to_diffusers(pipeline)
    assert type(again.scheduler) is FlowMatchEulerDiscreteScheduler
    assert again.scheduler.config.shift == SHIFT
    assert np.abs(draw(pipeline) - draw_theirs(again)).max() <= 1e-4
    pipeline.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "scheduler" / "scheduler_config.json").read_text())
    assert (saved["_class_name"], saved["shift"]) == ("FlowMatchEulerDiscreteScheduler", SHIFT)
    assert "steps_offset" not in saved
    assert TextToImagePipeline.from_pretrained(tmp_path / "saved").scheduler.schedule == FlowSchedule(
        shift=SHIFT
    )


def test_a_run_in_two_parts_is_the_whole(pipeline: TextToImagePipeline) -> None:
    options: dict[str, Any] = {"seed": 7, "num_inference_steps": 6, "progress": False}
    half = pipeline("a cat", denoising_end=0.3, output_type="latent", **options).images
    parts = pipeline("a cat", denoising_start=0.3, latents=half, output_type="np", **options).images
    whole = pipeline("a cat", denoising_start=0.0, denoising_end=1.0, output_type="np", **options).images
    assert np.abs(np.asarray(parts) - np.asarray(whole)).max() <= 1e-5
    assert np.array_equal(
        np.asarray(pipeline("a cat", output_type="np", **options).images), np.asarray(whole)
    )


def test_guidance_within_an_interval_counts_from_pure_noise(pipeline: TextToImagePipeline) -> None:
    guided = draw(pipeline)
    assert np.array_equal(draw(pipeline, guidance=GuidanceOptions(interval=(0.0, 0.9999))), guided)
    assert not np.array_equal(draw(pipeline, guidance=GuidanceOptions(interval=(0.001, 1.0))), guided)


@pytest.mark.parametrize(
    ("model", "scheduler", "message"),
    [
        ("folder", "DPM++ 2M Karras", "dpmpp_2m"),
        ("tiny_checkpoint", "FlowMatchEulerDiscreteScheduler", "flow_euler"),
    ],
)
def test_the_command_says_what_to_use(
    model: str,
    scheduler: str,
    message: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = str(request.getfixturevalue(model))
    out = str(tmp_path / "out.png")
    assert cli.main(["text2img", "a cat", "--model", path, "--scheduler", scheduler, "-o", out]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "; use " in error


def test_a_single_file_has_no_word_for_it(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="prediction_type 'flow_prediction'"):
        convert(folder, tmp_path / "flow.safetensors")
