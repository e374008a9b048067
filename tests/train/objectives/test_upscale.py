"""The objective of upscaling, and what it saves, against diffusers and transformers."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from latentgen.errors import ConfigError
from latentgen.pipelines.upscale import UpscalePipeline
from latentgen.train.config import TrainConfig, UpscaleTask
from latentgen.train.data import open_data
from latentgen.train.objectives.degradation import lower_resolution
from latentgen.train.objectives.image_conditioned import UpscaleObjective
from tests.train.oracles import assert_the_loss_is_that_of_diffusers, images_of
from tests.train.recipes import MakeRecipe, plan_for

ON_PIXELS = (
    "task.vae=null",
    "task.enlargement=2",
    "task.unet.in_channels=6",
    "task.unet.out_channels=3",
    "task.unet.sample_size=16",
)


def build(config: TrainConfig) -> UpscaleObjective:
    assert isinstance(config.task, UpscaleTask)
    torch.manual_seed(1)
    return UpscaleObjective(
        config.task,
        open_data(config.data),
        seed=config.seed,
        device=torch.device("cpu"),
        init_from=config.init_from,
    )


def space_to_depth(image: torch.Tensor) -> torch.Tensor:
    """Squares of 2x2 pixels of [B, C, 2h, 2w] as channels [B, 4C, h, w], those of one colour together."""
    rows = [image[:, :, y::2, x::2] for y in (0, 1) for x in (0, 1)]
    return torch.stack(rows, dim=2).flatten(1, 2)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("channels", [6, 7, 16])
def test_the_loss_is_that_of_diffusers(
    prediction_type: str, channels: int, upscale_recipe: MakeRecipe, tmp_path: Path
):
    overrides = (f"task.scheduler.prediction_type={prediction_type}", f"task.unet.in_channels={channels}")
    objective = build(upscale_recipe(*overrides, *(ON_PIXELS if channels == 6 else ())))
    as_channels: dict[int, Callable[[torch.Tensor], torch.Tensor]] = {
        6: lambda cond: F.interpolate(cond, size=(16, 16), mode="bicubic"),
        7: lambda cond: cond,
        16: space_to_depth,
    }
    assert_the_loss_is_that_of_diffusers(
        objective, tmp_path, prediction_type, as_channels=as_channels[channels]
    )


def test_the_conditioning_image_is_the_image_noised_by_diffusers(upscale_recipe: MakeRecipe):
    from diffusers import DDPMScheduler

    objective = build(upscale_recipe("task.views_per_image=1"))
    plan = plan_for(objective)
    *_, cond, levels = objective.batch(plan)
    clean = [
        torch.from_numpy(np.array(objective_image(objective, upscale_recipe().data, item)))
        for item in plan.items
    ]
    images = torch.stack(clean).permute(0, 3, 1, 2) / 127.5 - 1
    scheduler = DDPMScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="scaled_linear")
    noise = plan.noise(images.shape[1:], "low-resolution noise")
    torch.testing.assert_close(cond, scheduler.add_noise(images, noise, levels), atol=1e-5, rtol=1e-4)
    assert cond.shape == (8, 3, 8, 8)


def objective_image(objective: UpscaleObjective, data, item: int) -> Image.Image:
    """Item `item` of the tiny recipe in low resolution, generated again."""
    from latentgen.train.data import sample_rng

    view = open_data(data).sample(item, random.Random(0))  # a folder's views have nothing random
    return lower_resolution(view.image, 8, sample_rng(5, "degradation", item))


def test_low_noise_levels_are_the_likelier_ones(upscale_recipe: MakeRecipe):
    objective = build(upscale_recipe("task.max_noise_level=350"))
    levels = torch.cat([objective.batch(plan_for(objective, step))[5] for step in range(250)])
    assert levels.min() == 0
    assert 300 < levels.max() <= 350
    assert (levels == 0).float().mean().item() == pytest.approx(351**-0.5, abs=0.02)
    assert (levels < 88).float().mean().item() == pytest.approx(0.5, abs=0.04)
    assert (build(upscale_recipe("task.max_noise_level=0")).batch(plan_for(objective))[5] == 0).all()


def test_the_saved_folder_draws_the_same_in_diffusers(upscale_recipe: MakeRecipe, tmp_path: Path):
    from diffusers import StableDiffusionUpscalePipeline

    objective = build(upscale_recipe("task.max_noise_level=77", "task.guidance_scale=2"))
    objective.save(tmp_path, objective.state_dict())
    picture = Image.radial_gradient("L").resize((8, 8)).convert("RGB")
    oracle = StableDiffusionUpscalePipeline.from_pretrained(tmp_path)
    arguments = {"image": picture, "noise_level": 20}
    theirs = images_of(oracle, "red disc", guidance_scale=2, **arguments)
    pipeline = UpscalePipeline.from_pretrained(tmp_path, dtype="float32", device="cpu")
    assert (pipeline.scale, pipeline.max_noise_level, pipeline.default_guidance_scale) == (2, 77, 2.0)
    assert np.abs(images_of(pipeline, "red disc", **arguments) - theirs).max() < 1e-4


def test_on_pixels_the_saved_folder_upscales_as_it_was_trained(upscale_recipe: MakeRecipe, tmp_path: Path):
    objective = build(upscale_recipe(*ON_PIXELS))
    latents, *_, cond, _ = objective.batch(plan_for(objective))
    assert (latents.shape, cond.shape) == ((8, 3, 16, 16), (8, 3, 8, 8))
    objective.save(tmp_path, objective.state_dict())
    pipeline = UpscalePipeline.from_pretrained(tmp_path, dtype="float32", device="cpu")
    assert (pipeline.scale, pipeline.max_noise_level, pipeline.default_guidance_scale) == (2, 350, 9.0)
    (image,) = pipeline(
        image=Image.new("RGB", (9, 7), "red"), num_inference_steps=2, seed=0, progress=False
    ).images
    assert isinstance(image, Image.Image)
    assert image.size == (18, 14)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("task.unet.in_channels=4", "in_channels is 4; .* 7 for x2, 16 for x1"),
        ("task.enlargement=2", "enlargement is 2"),
        ("task.unet.class_embed_type=null", "class_labels"),
        ("task.unet.class_embed_type=identity", "class_embed_type is 'identity'"),
        ("task.max_noise_level=1000", "max_noise_level is 1000;.* 999"),
        ("task.low_res_scheduler.beta_start=-1", "beta_start"),
    ],
)
def test_configurations_that_do_not_fit(override: str, message: str, upscale_recipe: MakeRecipe):
    with pytest.raises(ConfigError, match=message):
        build(upscale_recipe(override))
