"""Tiny recipes for tests."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

from PIL import Image

from latentgen.train.config import TrainConfig
from latentgen.train.data import BatchIndices, plan_step
from latentgen.train.objectives.base import Objective

# Takes overrides like the command's --set.
MakeRecipe = Callable[..., TrainConfig]

COLOURS = ("red", "green", "blue", "yellow", "black", "white")


def encoded(colour: str, size: tuple[int, int] = (12, 10), kind: str = "PNG") -> bytes:
    """An image file of one colour."""
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, kind)
    return file.getvalue()


VAE: dict[str, Any] = {
    "block_out_channels": [16, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "sample_size": 16,
    "scaling_factor": 0.5,
}
TEXT_TO_IMAGE: dict[str, Any] = {
    "kind": "text_to_image",
    "unet": {
        "sample_size": 8,
        "block_out_channels": [16, 32],
        "layers_per_block": 1,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
        "norm_num_groups": 8,
    },
    "text_encoder": {
        "vocab_size": 530,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 8,
        "projection_dim": 16,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    },
    "scheduler": {
        "_class_name": "DDIMScheduler",
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "clip_sample": False,
        "prediction_type": "v_prediction",
        "steps_offset": 1,
    },
    "views_per_image": 2,
}
PAIRED: dict[str, Any] = {
    "kind": "paired",
    "unet": TEXT_TO_IMAGE["unet"] | {"in_channels": 8, "cross_attention_dim": 32},
    "scheduler": TEXT_TO_IMAGE["scheduler"],
    "degradation": "colorization",
    "views_per_image": 2,
}
# In latents of half the images' side, that of the low-resolution image: x2. With 16 channels it would be x1.
UPSCALE: dict[str, Any] = {
    "kind": "upscale",
    "unet": TEXT_TO_IMAGE["unet"]
    | {"in_channels": 7, "cross_attention_dim": 32, "class_embed_type": "timestep"},
    "scheduler": TEXT_TO_IMAGE["scheduler"],
    "low_res_scheduler": {
        "_class_name": "DDPMScheduler",
        "beta_schedule": "scaled_linear",
        "beta_start": 0.0001,
        "beta_end": 0.02,
    },
    "views_per_image": 2,
}


def without_validation(config: TrainConfig) -> TrainConfig:
    """A recipe without its validation, with the same training images."""
    return config.model_copy(update={"validation": None})


def plan_for(objective: Objective, step: int = 0, size: int = 8) -> BatchIndices:
    """The whole batch of a step, in one process."""
    (plan,) = plan_step(3, step, batch_size=size, order=objective.order, parts=1, rank=0, processes=1)
    return plan
