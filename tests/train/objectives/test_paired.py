"""The objective of paired image to image, and what it saves, against diffusers and transformers."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from latentgen.errors import CheckpointMismatchError, ConfigError
from latentgen.pipelines.concat import ConcatImagePipeline
from latentgen.train.config import Degradation, TrainConfig
from latentgen.train.data import open_data, sample_rng, to_tensor
from latentgen.train.objectives import build_objective
from latentgen.train.objectives.degradation import DEGRADATIONS
from latentgen.train.objectives.image_conditioned import PairedObjective
from tests.train.oracles import assert_the_loss_is_that_of_diffusers, images_of
from tests.train.recipes import MakeRecipe, plan_for


def build(config: TrainConfig) -> PairedObjective:
    torch.manual_seed(1)
    objective = build_objective(config, device=torch.device("cpu"))
    assert isinstance(objective, PairedObjective)
    return objective


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("space", ["latents", "pixels"])
def test_the_loss_is_that_of_diffusers(
    prediction_type: str, space: str, paired_recipe: MakeRecipe, tmp_path: Path
):
    overrides = ("task.vae=null", "task.unet.in_channels=6", "task.unet.out_channels=3")
    on_pixels = overrides if space == "pixels" else ()
    objective = build(paired_recipe(f"task.scheduler.prediction_type={prediction_type}", *on_pixels))
    assert_the_loss_is_that_of_diffusers(objective, tmp_path, prediction_type)
    kind = json.loads((tmp_path / "model_index.json").read_text("utf-8"))["_class_name"]
    assert (kind == "LatentgenPixelPairedPipeline") == (space == "pixels")


@pytest.mark.parametrize("degradation", get_args(Degradation))
def test_the_conditioning_image_is_the_degraded_image_encoded_by_diffusers(
    degradation: Degradation, paired_recipe: MakeRecipe, tiny_checkpoint: Path
):
    from diffusers import AutoencoderKL

    config = paired_recipe("task.views_per_image=1", f"task.degradation={degradation}")
    objective, data = build(config), open_data(config.data)
    plan = plan_for(objective, size=6)
    latents, *_, cond = objective.batch(plan)
    images = [data.sample(item, random.Random(0)).image for item in plan.items]  # whole: they are square
    degraded = [
        DEGRADATIONS[degradation](image, sample_rng(5, "degradation", item))
        for image, item in zip(images, plan.items, strict=True)
    ]
    vae = AutoencoderKL.from_pretrained(tiny_checkpoint / "vae")
    with torch.no_grad():
        expected = vae.encode(to_tensor(degraded)).latent_dist.mode()
        posterior = vae.encode(to_tensor(images)).latent_dist
    assert ((cond - expected).norm() / expected.norm()).item() < 1e-3  # stored in float16
    drawn = (posterior.mean + posterior.std * plan.noise(posterior.mean.shape[1:], "posterior")) * 0.18215
    assert ((latents - drawn).norm() / drawn.norm()).item() < 1e-3


def in_yaml(fields: dict[str, Any]) -> str:
    """In one line; of JSON, YAML takes 1e-05 for a text."""
    return yaml.safe_dump(fields, default_flow_style=True, width=10**6)


def test_a_text_to_image_model_is_where_it_begins(
    paired_recipe: MakeRecipe, text_to_image_recipe: MakeRecipe, tiny_checkpoint: Path
):
    unet, text = (
        json.loads((tiny_checkpoint / part / "config.json").read_text("utf-8"))
        for part in ("unet", "text_encoder")
    )
    plain = build_objective(
        text_to_image_recipe(
            f"task.unet={in_yaml(unet)}",
            f"task.text_encoder={in_yaml(text)}",
            "task.train_text_encoder=false",
            f"init_from={tiny_checkpoint}",
        ),
        device=torch.device("cpu"),
    )
    objective = build(
        paired_recipe(f"task.unet={in_yaml(unet | {'in_channels': 8})}", f"init_from={tiny_checkpoint}")
    )
    batch = objective.batch(plan_for(objective))
    assert batch[4].abs().mean() > 0.1
    loss, expected = objective(*batch), plain(*batch[:4])
    assert loss.total.item() == expected.total.item()
    loss.total.backward()
    kernel = objective.unet.conv_in.weight
    assert kernel.grad is not None
    assert kernel.grad[:, 4:].abs().max() > 0  # weights of 0 are trained, too
    old = load_file(tiny_checkpoint / "unet" / "diffusion_pytorch_model.safetensors")
    for name, weight in objective.unet.state_dict().items():
        initial = old[name]
        if name == "conv_in.weight":
            initial = torch.cat([initial, torch.zeros_like(initial)], dim=1)
        assert torch.equal(weight, initial), name
    assert all(parameter.requires_grad for parameter in objective.unet.parameters())


def test_starting_from_a_paired_model(paired_recipe: MakeRecipe, tmp_path: Path):
    first = build(paired_recipe())
    first.save(tmp_path / "model", first.state_dict())
    tuned = build(paired_recipe(f"init_from={tmp_path / 'model'}", "task.degradation=jpeg")).state_dict()
    assert all(torch.equal(tuned[name], tensor) for name, tensor in first.state_dict().items())


def test_other_models_are_no_beginning(
    paired_recipe: MakeRecipe, text_to_image_recipe: MakeRecipe, tiny_checkpoint: Path, tmp_path: Path
):
    with pytest.raises(CheckpointMismatchError, match=r"130 of the 208 .*78 missing"):
        build(paired_recipe(f"init_from={tiny_checkpoint}"))
    pixels = ("task.vae=null", "task.unet.in_channels=3", "task.unet.out_channels=3")
    on_pixels = build_objective(text_to_image_recipe(*pixels), device=torch.device("cpu"))
    on_pixels.save(tmp_path / "model", on_pixels.state_dict())
    with pytest.raises(CheckpointMismatchError, match=r"misshapen \(conv_in\.weight is F32 \[16, 3, 3, 3\]"):
        build(paired_recipe(f"init_from={tmp_path / 'model'}"))


def test_the_saved_folder_draws_the_same_in_diffusers(paired_recipe: MakeRecipe, tmp_path: Path):
    from diffusers import StableDiffusionInstructPix2PixPipeline

    objective = build(paired_recipe("task.guidance_scale=2"))
    objective.save(tmp_path, objective.state_dict())
    picture = Image.radial_gradient("L").resize((16, 16)).convert("RGB")
    oracle = StableDiffusionInstructPix2PixPipeline.from_pretrained(tmp_path, safety_checker=None)
    theirs = images_of(oracle, "red disc", image=picture, guidance_scale=2, image_guidance_scale=1)
    pipeline = ConcatImagePipeline.from_pretrained(tmp_path, dtype="float32", device="cpu")
    assert pipeline.default_guidance_scale == 2.0
    assert np.abs(images_of(pipeline, "red disc", image=picture) - theirs).max() < 1e-4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "task.unet.in_channels=4",
            "in_channels is 4; with task.vae it can be 8 for the latents and those of an",
        ),
        ("task.unet.class_embed_type=timestep", "class_labels"),
    ],
)
def test_configurations_that_do_not_fit(override: str, message: str, paired_recipe: MakeRecipe):
    with pytest.raises(ConfigError, match=message):
        build(paired_recipe(override))
