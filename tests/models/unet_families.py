"""Tiny configurations of every UNet family, as diffusers' JSON has them, and inputs for them."""

from __future__ import annotations

from typing import Any

import torch

from latentgen.models.unet import AddedConditioning
from latentgen.models.unet_config import UNetConfig

_CROSS_DOWN, _CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"

SD1: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": [16, 32, 32],
    "down_block_types": [_CROSS_DOWN, _CROSS_DOWN, "DownBlock2D"],
    "up_block_types": ["UpBlock2D", _CROSS_UP, _CROSS_UP],
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
SD2 = SD1 | {"use_linear_projection": True, "attention_head_dim": [1, 2, 2], "upcast_attention": True}
SDXL = SD2 | {
    "down_block_types": ["DownBlock2D", _CROSS_DOWN, _CROSS_DOWN],
    "up_block_types": [_CROSS_UP, _CROSS_UP, "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 3],
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 20 + 6 * 8,
}
REFINER = SDXL | {
    "block_out_channels": [24, 48, 96, 96],
    "down_block_types": ["DownBlock2D", _CROSS_DOWN, _CROSS_DOWN, "DownBlock2D"],
    "up_block_types": ["UpBlock2D", _CROSS_UP, _CROSS_UP, "UpBlock2D"],
    "attention_head_dim": [3, 6, 12, 12],
    "transformer_layers_per_block": 4,
    "projection_class_embeddings_input_dim": 20 + 5 * 8,
}
UPSCALER = SD1 | {
    "in_channels": 7,
    "block_out_channels": [16, 32, 32, 64],
    "down_block_types": ["DownBlock2D", *(_CROSS_DOWN,) * 3],
    "up_block_types": [*(_CROSS_UP,) * 3, "UpBlock2D"],
    "use_linear_projection": True,
    "only_cross_attention": [True, True, True, False],
    "num_class_embeds": 10,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "sd1": SD1,
    "sd2": SD2,
    "sdxl": SDXL,
    "sdxl-refiner": REFINER,
    "inpaint": SD1 | {"in_channels": 9},
    "instruct-pix2pix": SD1 | {"in_channels": 8},
    "x4-upscaler": UPSCALER,
    "class-labels": SD1 | {"num_class_embeds": 10},
    "scalar": SD1 | {"class_embed_type": "timestep"},
    "class-projection": SD1 | {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 5},
    "class-identity": SD1 | {"class_embed_type": "identity"},
    "scale-shift": SD1 | {"resnet_time_scale_shift": "scale_shift"},
    "no-middle": SD1 | {"mid_block_type": None, "layers_per_block": [1, 2, 1]},
    "embedding-order": SD1 | {"flip_sin_to_cos": False, "freq_shift": 1, "downsample_padding": 0},
}


def build_inputs(config: UNetConfig, *, batch: int = 2, size: int = 8) -> dict[str, Any]:
    """Random arguments for `UNet.forward`, the same at every call."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    inputs: dict[str, Any] = {
        "sample": normal(batch, config.in_channels, size, size),
        "timestep": torch.linspace(981, 21, batch),
        "context": normal(batch, 7, config.cross_attention_dim),
    }
    match config.class_embed_type:
        case "timestep":
            inputs["class_labels"] = torch.linspace(0.5, 300, batch)
        case "projection":
            inputs["class_labels"] = normal(batch, config.projection_class_embeddings_input_dim or 0)
        case "identity":
            inputs["class_labels"] = normal(batch, config.time_embed_dim)
        case None if config.num_class_embeds is not None:
            inputs["class_labels"] = torch.arange(batch) + 3
    if config.addition_embed_type is not None:
        pooled = 20
        ids = ((config.projection_class_embeddings_input_dim or 0) - pooled) // (
            config.addition_time_embed_dim or 1
        )
        inputs["added"] = AddedConditioning(
            normal(batch, pooled), 512 * torch.rand(batch, ids, generator=generator)
        )
    return inputs
