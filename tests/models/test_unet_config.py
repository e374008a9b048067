"""The UNet's configuration: diffusers' JSON in and out, parameters, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from latentgen.errors import ConfigError
from latentgen.models.unet import UNet
from latentgen.models.unet_config import UNetConfig

_CROSS_DOWN, _CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
_LINEAR: dict[str, Any] = {"use_linear_projection": True}
_SDXL_BLOCKS: dict[str, Any] = {
    "down_block_types": ["DownBlock2D", _CROSS_DOWN, _CROSS_DOWN],
    "up_block_types": [_CROSS_UP, _CROSS_UP, "UpBlock2D"],
    "block_out_channels": [320, 640, 1280],
    "attention_head_dim": [5, 10, 20],
    "transformer_layers_per_block": [1, 2, 10],
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_UPSCALER: dict[str, Any] = {
    "in_channels": 7,
    "down_block_types": ["DownBlock2D", *(_CROSS_DOWN,) * 3],
    "up_block_types": [*(_CROSS_UP,) * 3, "UpBlock2D"],
    "block_out_channels": [256, 512, 512, 1024],
    "only_cross_attention": [True, True, True, False],
    "num_class_embeds": 1000,
}


def test_reads_and_writes_what_diffusers_does(family_fields):
    oracle = UNet2DConditionModel.from_config(family_fields)
    config = UNetConfig.from_json(json.loads(oracle.to_json_string()))
    assert config == UNetConfig.from_json(family_fields)
    written = json.loads(json.dumps(config.to_json()))
    assert UNetConfig.from_json(written) == config
    ours = UNet2DConditionModel.from_config(written).config
    assert {name: ours[name] for name in family_fields} == family_fields


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({"cross_attention_dim": 768}, 859_520_964),
        ({"cross_attention_dim": 768, "in_channels": 9}, 859_535_364),
        ({"cross_attention_dim": 768, "time_cond_proj_dim": 256}, 859_520_964 + 256 * 320),
        (_LINEAR | {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20]}, 865_910_724),
        (_LINEAR | _SDXL_BLOCKS | {"cross_attention_dim": 2048}, 2_567_463_684),
        (_LINEAR | _UPSCALER | {"cross_attention_dim": 1024}, 473_398_020),
    ],
    ids=["sd1", "inpaint", "lcm", "sd2", "sdxl", "x4-upscaler"],
)
def test_counts_of_published_models(fields, count):
    with torch.device("meta"):
        unet = UNet(UNetConfig.from_json(fields))
    assert sum(parameter.numel() for parameter in unet.parameters()) == count


def test_metadata_of_the_file_is_passed_over(sd1_fields):
    metadata = {"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.6.0", "_name_or_path": "x"}
    assert UNetConfig.from_json(sd1_fields | metadata) == UNetConfig.from_json(sd1_fields)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("unknown_field", 1),
        ("in_channels", "4"),
        ("in_channels", True),
        ("in_channels", 0),
        ("in_channels", 10**9),
        ("norm_eps", float("nan")),
        ("norm_eps", float("inf")),
        ("norm_eps", -1e-5),
        ("norm_num_groups", None),
        ("block_out_channels", []),
        ("block_out_channels", [16, 30, 32]),
        ("block_out_channels", [16, 32]),
        ("block_out_channels", 16),
        ("down_block_types", ["AttnDownBlock2D"] * 3),
        ("up_block_types", ["UpBlock2D"] * 2),
        ("layers_per_block", [1, 1]),
        ("layers_per_block", 1000),
        ("attention_head_dim", 5),
        ("attention_head_dim", [4, 4]),
        ("transformer_layers_per_block", [[1, 1], 1, 1]),
        ("transformer_layers_per_block", 10**6),
        ("only_cross_attention", [True]),
        ("mid_block_type", "UNetMidBlock2DSimpleCrossAttn"),
        ("mid_block_scale_factor", 2),
        ("act_fn", "mish"),
        ("dropout", 0.1),
        ("class_embed_type", "simple_projection"),
        ("class_embed_type", "projection"),
        ("addition_embed_type", "image"),
        ("addition_embed_type", "text_time"),
        ("time_cond_proj_dim", 3),
        ("encoder_hid_dim", 64),
        ("conv_in_kernel", 1),
        ("resnet_time_scale_shift", "ada_group"),
    ],
)
def test_bad_fields_are_named(sd1_fields, field, value):
    with pytest.raises(ConfigError, match=field.removesuffix("s")):
        UNetConfig.from_json(sd1_fields | {field: value})


@pytest.mark.parametrize(
    "fields",
    [
        {"block_out_channels": [16384] * 3},
        {"block_out_channels": [4096] * 3, "num_class_embeds": 10**6},
        {"block_out_channels": [64, 64, 8192], "transformer_layers_per_block": 64},
    ],
    ids=["stages", "class-table", "middle"],
)
def test_huge_models_are_refused_before_they_are_built(sd1_fields, fields):
    with pytest.raises(ConfigError, match="parameters; at most 10,000,000,000"):
        UNetConfig.from_json(sd1_fields | fields)


def test_models_of_too_many_blocks_are_refused_before_they_are_built(sd1_fields):
    with pytest.raises(ConfigError, match=r"transformer_layers_per_block.* 1,216 .* at most 1,000"):
        UNetConfig.from_json(sd1_fields | {"layers_per_block": 4, "transformer_layers_per_block": 64})


def test_too_narrow_a_time_embedding_is_refused(sd1_fields):
    narrow = {"block_out_channels": [2, 8, 8], "norm_num_groups": 1, "attention_head_dim": 1, "freq_shift": 1}
    with pytest.raises(ConfigError, match="too few for a time embedding"):
        UNetConfig.from_json(sd1_fields | narrow)
