"""Text to image in pixels, and on parts of a trained model."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from latentgen.errors import CheckpointMismatchError, ConfigError
from latentgen.pipelines.text_to_image import TextToImagePipeline
from latentgen.train.checkpoint import load_latest
from latentgen.train.config import TrainConfig
from latentgen.train.data import open_data
from latentgen.train.objectives import build_objective
from latentgen.train.trainer import train
from tests.train.objectives.test_text_to_image import build, plan_for
from tests.train.recipes import MakeRecipe

PIXELS = ("task.vae=null", "task.unet.in_channels=3", "task.unet.out_channels=3", "task.unet.sample_size=16")
FRESH = "task.reinit_layers=[conv_in, conv_out]"


@pytest.fixture
def latent_model(text_to_image_recipe: MakeRecipe, tmp_path: Path) -> Path:
    """A folder with a model of four channels."""
    objective = build(text_to_image_recipe())
    objective.save(tmp_path / "latent", objective.state_dict())
    return tmp_path / "latent"


@pytest.fixture
def outline(text_to_image_recipe: MakeRecipe, latent_model: Path) -> TrainConfig:
    """Pixels, on the layers and the frozen text encoder of that model."""
    options = (f"init_from={latent_model}", FRESH, "task.train_text_encoder=false")
    return text_to_image_recipe(*PIXELS, *options)


def test_the_latents_are_the_pixels(text_to_image_recipe: MakeRecipe):
    config = text_to_image_recipe(*PIXELS)
    objective = build(config)
    data, plan = open_data(config.data), plan_for(objective, size=12)
    latents = objective.batch(plan)[0]
    assert latents.shape == (12, 3, 16, 16)
    for image, place in zip(latents, plan.items, strict=True):
        pixels = data.sample(place // 2, random.Random(0)).image  # all views are equal: the images are square
        levels = ((image + 1) * 127.5).round().to(torch.uint8)
        assert np.array_equal(levels.permute(1, 2, 0).numpy(), np.asarray(pixels))


def test_the_model_draws(text_to_image_recipe: MakeRecipe, tmp_path: Path):
    objective = build(text_to_image_recipe(*PIXELS, "task.guidance_scale=2"))
    objective.save(tmp_path / "model", objective.state_dict())
    pipeline = TextToImagePipeline.from_pretrained(tmp_path / "model", dtype="float32", device="cpu")
    assert pipeline.default_guidance_scale == 2.0
    images = pipeline("red disc", num_inference_steps=2, seed=1, output_type="pt", progress=False).images
    assert isinstance(images, torch.Tensor)
    assert images.shape == (1, 3, 16, 16)


def test_reinit_layers_begin_at_random_and_all_others_as_they_were(outline: TrainConfig, latent_model: Path):
    old = load_file(latent_model / "unet" / "diffusion_pytorch_model.safetensors")
    new = build(outline).unet.state_dict()
    assert new.keys() == old.keys()
    assert new["conv_in.weight"].shape[1] == new["conv_out.weight"].shape[0] == 3
    for name, tensor in new.items():
        if not name.startswith(("conv_in.", "conv_out.")):
            assert torch.equal(tensor, old[name]), name
    assert new["conv_in.weight"].unique().numel() > 400


def test_what_is_not_fresh_must_fit(text_to_image_recipe: MakeRecipe, latent_model: Path):
    with pytest.raises(CheckpointMismatchError, match=r"2 misshapen \(conv_out"):
        build(text_to_image_recipe(*PIXELS, f"init_from={latent_model}", "task.reinit_layers=[conv_in]"))
    with pytest.raises(CheckpointMismatchError, match="misshapen"):
        build(text_to_image_recipe(*PIXELS, f"init_from={latent_model}"))
    with pytest.raises(ConfigError, match=r"'conv_inn' is not a layer .*conv_in,"):
        build(text_to_image_recipe(*PIXELS, f"init_from={latent_model}", "task.reinit_layers=[conv_inn]"))


def test_a_frozen_text_encoder_is_in_the_model_and_in_no_checkpoint(outline: TrainConfig, latent_model: Path):
    model = train(outline)
    state = load_latest(outline.output_dir)
    for weights in (state.weights, state.ema):
        assert {name.split(".")[0] for name in weights} == {"unet"}
    file = Path("text_encoder", "model.safetensors")
    ours, theirs = load_file(model / file), load_file(latent_model / file)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_latents_of_four_channels_do_not_fit(text_to_image_recipe: MakeRecipe):
    with pytest.raises(ConfigError, match=r"in_channels is 4; with task\.vae it can be 3 for"):
        build_objective(text_to_image_recipe("task.vae=null"), device=torch.device("cpu"))
