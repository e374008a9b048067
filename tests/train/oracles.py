"""What diffusers makes of a model that an objective has saved: the loss of a batch, and images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from latentgen.pipelines.base import Pipeline
from latentgen.train.objectives.latent_diffusion import LatentObjective
from tests.train.recipes import plan_for


def assert_the_loss_is_that_of_diffusers(
    objective: LatentObjective[Any],
    folder: Path,
    prediction_type: str,
    *,
    as_channels: Callable[[Tensor], Tensor] = lambda image: image,
) -> None:
    """Save the model to `folder`, and compare the losses of one batch.

    `as_channels` brings the image that the UNet is conditioned on, if there is one, to the size of the latents.
    """
    from diffusers import DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel

    objective.save(folder, objective.state_dict())
    plan = plan_for(objective)
    latents, noise, timesteps, _, *cond = batch = objective.batch(plan)
    tokens = objective._text.towers[0].tokenize(objective._captions(objective._latents.batch(plan)))
    images, levels = cond[:1], cond[1] if len(cond) > 1 else None
    with torch.no_grad():
        loss = objective(*batch)
        context = CLIPTextModel.from_pretrained(folder / "text_encoder")(tokens[:, 0]).last_hidden_state
        scheduler = DDPMScheduler.from_pretrained(folder / "scheduler")
        noisy = scheduler.add_noise(latents, noise, timesteps)
        sample = torch.cat([noisy, *map(as_channels, images)], dim=1)
        unet = UNet2DConditionModel.from_pretrained(folder / "unet")
        output = unet(sample, timesteps, context, class_labels=levels).sample
    targets = {
        "epsilon": noise,
        "v_prediction": scheduler.get_velocity(latents, noise, timesteps),
        "sample": latents,
    }
    assert scheduler.config["prediction_type"] == prediction_type
    errors = F.mse_loss(output, targets[prediction_type], reduction="none").mean(dim=(1, 2, 3))
    assert loss.total.item() == pytest.approx(errors.mean().item(), rel=1e-5)
    noisy = loss.subsets["noisy half"]
    assert (noisy.total / noisy.count).item() == pytest.approx(
        errors[timesteps >= 500].mean().item(), rel=1e-5
    )


def images_of(pipeline: Any, prompt: str, **arguments: Any) -> np.ndarray:
    """Three steps of a pipeline of this library or of diffusers, from the same seed."""
    if isinstance(pipeline, Pipeline):
        arguments |= {"seed": 4, "progress": False}
    else:
        pipeline.set_progress_bar_config(disable=True)
        arguments |= {"generator": [torch.Generator().manual_seed(4)]}
    return np.asarray(pipeline(prompt, num_inference_steps=3, output_type="np", **arguments).images)
