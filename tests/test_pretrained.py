"""The embedded default model: what it ships, and that diffusers draws the same picture with it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from latentgen import CascadePipeline, TextToImagePipeline, UpscalePipeline
from latentgen.checkpoints.folder import EMBEDDED_DEFAULT

CASCADE_PROMPTS = ("tiger face", "slice of pizza", "rocket", "penguin on a blue background")
PROMPTS = ("slice of pizza", "tiger face on a teal background", "rocket", "coffee")
MAX_BYTES = 80_000_000


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


@pytest.mark.parametrize("prompt", PROMPTS[:2])
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


@pytest.fixture(scope="module")
def stages() -> list[np.ndarray]:
    """What the stages of the embedded cascade draw."""
    cascade = CascadePipeline.from_pretrained(dtype="float32", device="cpu")
    results = cascade.stream(
        CASCADE_PROMPTS, seed=[7] * len(CASCADE_PROMPTS), output_type="np", progress=False
    )
    return [np.asarray(result.images) for result in results]


def test_the_cascade_draws_larger_and_larger(stages: list[np.ndarray]) -> None:
    sides = [images.shape for images in stages]
    assert sides == [(len(CASCADE_PROMPTS), side, side, 3) for side in (16, 64, 64, 128)]


@pytest.mark.parametrize(("stage", "most"), [(1, 0.02), (2, 0.05), (3, 0.02)])
def test_each_stage_draws_what_the_one_before_drew(stage: int, most: float, stages: list[np.ndarray]) -> None:
    side = stages[stage - 1].shape[1]
    scale = stages[stage].shape[1] // side
    small = stages[stage].reshape(-1, side, scale, side, scale, 3).mean((2, 4))
    distances = np.square(small[:, None] - stages[stage - 1][None]).mean((2, 3, 4))
    assert (distances.argmin(axis=1) == np.arange(len(CASCADE_PROMPTS))).all()
    assert distances.diagonal().max() < most  # a stage that refines may change it more


def test_the_last_stage_is_sharper_than_the_one_before_enlarged(stages: list[np.ndarray]) -> None:
    def gradient(images: np.ndarray) -> float:
        across, down = np.diff(images, axis=2)[:, :-1], np.diff(images, axis=1)[:, :, :-1]
        return float(np.square(across).mean() + np.square(down).mean())

    small = torch.from_numpy(stages[2]).permute(0, 3, 1, 2)
    enlarged = F.interpolate(small, scale_factor=2, mode="bicubic").permute(0, 2, 3, 1).numpy()
    assert gradient(stages[3]) > 1.2 * gradient(enlarged)


def test_the_embedded_upscaler_is_the_last_stage(stages: list[np.ndarray]) -> None:
    upscale = UpscalePipeline.from_pretrained(dtype="float32", device="cpu")
    assert upscale.scale == 2
    images = upscale(
        "tiger face",
        image=stages[2][0],
        num_inference_steps=1,
        noise_level=0,
        output_type="np",
        progress=False,
    ).images
    assert np.asarray(images).shape == (1, 128, 128, 3)


def test_the_source_is_where_a_wheel_puts_it() -> None:
    assert Path(__file__).parents[1] / "latentgen" / "pretrained" == EMBEDDED_DEFAULT
