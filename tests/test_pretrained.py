"""The embedded default model: what it ships, and that diffusers draws the same picture with it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from latentgen import TextToImagePipeline
from latentgen.checkpoints.folder import EMBEDDED_DEFAULT

PROMPTS = ("slice of pizza", "tiger face on a teal background", "rocket", "coffee")
MAX_BYTES = 40_000_000


@pytest.fixture(scope="module")
def pipeline() -> TextToImagePipeline:
    return TextToImagePipeline.from_pretrained(dtype="float32", device="cpu")


def draw(pipeline: TextToImagePipeline, prompts: list[str], seeds: list[int]) -> np.ndarray:
    result = pipeline(prompts, seed=seeds, num_inference_steps=8, output_type="np", progress=False)
    return np.asarray(result.images)


def test_the_weights_are_half_precision_and_small() -> None:
    files = list(EMBEDDED_DEFAULT.rglob("*.safetensors"))
    assert {file.parent.name for file in files} == {"unet", "vae", "text_encoder"}
    assert sum(file.stat().st_size for file in files) <= MAX_BYTES


def test_card_notice_and_captions_are_there() -> None:
    names = (EMBEDDED_DEFAULT / "captions.txt").read_text("utf-8").splitlines()
    assert len(names) == len(set(names)) > 1300
    assert {"slice of pizza", "tiger face"} <= set(names)
    assert "OFL" in (EMBEDDED_DEFAULT / "NOTICE").read_text("utf-8")
    assert (EMBEDDED_DEFAULT / "README.md").is_file()


def test_no_file_names_the_folder_it_was_made_in() -> None:
    for file in EMBEDDED_DEFAULT.rglob("*.json"):
        assert "_name_or_path" not in json.loads(file.read_text("utf-8")), file


@pytest.mark.parametrize("prompt", PROMPTS)
def test_diffusers_draws_the_same_picture(pipeline: TextToImagePipeline, prompt: str) -> None:
    from diffusers import StableDiffusionPipeline

    peer = StableDiffusionPipeline.from_pretrained(
        EMBEDDED_DEFAULT, torch_dtype=torch.float32, safety_checker=None
    )
    peer.set_progress_bar_config(disable=True)
    theirs = peer(
        prompt,
        num_inference_steps=8,
        guidance_scale=pipeline.default_guidance_scale,
        generator=[torch.Generator().manual_seed(7)],
        output_type="np",
    ).images
    assert np.abs(draw(pipeline, [prompt], [7]) - theirs).max() <= 1e-4


def test_a_seed_gives_its_image_alone_in_a_batch_and_in_any_order(pipeline: TextToImagePipeline) -> None:
    prompts, seeds = list(PROMPTS), [3, 1, 4, 5]
    batch = draw(pipeline, prompts, seeds)
    alone = np.concatenate([draw(pipeline, [p], [s]) for p, s in zip(prompts, seeds, strict=True)])
    turned = draw(pipeline, prompts[::-1], seeds[::-1])[::-1]
    assert np.abs(batch - alone).max() <= 1e-3
    assert np.abs(batch - turned).max() <= 1e-3
    assert np.abs(batch[0] - batch[1]).max() > 0.1


def test_the_prompt_decides_what_is_drawn(pipeline: TextToImagePipeline) -> None:
    on_teal, on_white = draw(pipeline, ["rocket on a teal background", "rocket"], [0, 0])
    corners = np.stack([image[[0, 0, -1, -1], [0, -1, 0, -1]].mean(axis=0) for image in (on_teal, on_white)])
    assert np.abs(corners[0] - np.array([22, 150, 150]) / 255).max() < 0.15
    assert np.abs(corners[1] - 1.0).max() < 0.1


def test_the_source_is_where_a_wheel_puts_it() -> None:
    assert Path(__file__).parents[1] / "latentgen" / "pretrained" == EMBEDDED_DEFAULT
