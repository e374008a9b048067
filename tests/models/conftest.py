"""Tiny configurations of every UNet family, as diffusers' JSON has them."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

_CROSS_DOWN, _CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"

_SD1: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": [16, 32, 32],
    "down_block_types": [_CROSS_DOWN, _CROSS_DOWN, "DownBlock2D"],
    "up_block_types": ["UpBlock2D", _CROSS_UP, _CROSS_UP],
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
_SD2 = _SD1 | {"use_linear_projection": True, "attention_head_dim": [1, 2, 2], "upcast_attention": True}
_SDXL = _SD2 | {
    "down_block_types": ["DownBlock2D", _CROSS_DOWN, _CROSS_DOWN],
    "up_block_types": [_CROSS_UP, _CROSS_UP, "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 3],
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 20 + 6 * 8,
}
_REFINER = _SDXL | {
    "block_out_channels": [24, 48, 96, 96],
    "down_block_types": ["DownBlock2D", _CROSS_DOWN, _CROSS_DOWN, "DownBlock2D"],
    "up_block_types": ["UpBlock2D", _CROSS_UP, _CROSS_UP, "UpBlock2D"],
    "attention_head_dim": [3, 6, 12, 12],
    "transformer_layers_per_block": 4,
    "projection_class_embeddings_input_dim": 20 + 5 * 8,
}
_UPSCALER = _SD2 | {
    "in_channels": 7,
    "block_out_channels": [16, 32, 32, 64],
    "down_block_types": ["DownBlock2D", *(_CROSS_DOWN,) * 3],
    "up_block_types": [*(_CROSS_UP,) * 3, "UpBlock2D"],
    "attention_head_dim": 8,
    "only_cross_attention": [True, True, True, False],
    "num_class_embeds": 10,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "sd1": _SD1,
    "sd2": _SD2,
    "sdxl": _SDXL,
    "sdxl-refiner": _REFINER,
    "inpaint": _SD1 | {"in_channels": 9},
    "instruct-pix2pix": _SD1 | {"in_channels": 8},
    "x4-upscaler": _UPSCALER,
    "class-labels": _SD1 | {"num_class_embeds": 10},
    "scalar": _SD1 | {"class_embed_type": "timestep"},
    "class-projection": _SD1 | {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 5},
    "class-identity": _SD1 | {"class_embed_type": "identity"},
    "scale-shift": _SD1 | {"resnet_time_scale_shift": "scale_shift"},
    "no-middle": _SD1 | {"mid_block_type": None, "layers_per_block": [1, 2, 1]},
    "latent-consistency": _SD1 | {"time_cond_proj_dim": 12},
    "embedding-order": _SD1 | {"flip_sin_to_cos": False, "freq_shift": 1, "downsample_padding": 0},
}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.detach() - expected.detach()).norm() / expected.detach().norm())


@pytest.fixture
def sd1_fields() -> dict[str, Any]:
    """The fields of a tiny SD 1.x `unet/config.json`."""
    return dict(_SD1)


@pytest.fixture
def sdxl_fields() -> dict[str, Any]:
    """The fields of a tiny SDXL `unet/config.json`."""
    return dict(_SDXL)


@pytest.fixture(params=FAMILIES)
def family_fields(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The fields of a tiny `unet/config.json`, of each family in turn."""
    return dict(FAMILIES[request.param])
