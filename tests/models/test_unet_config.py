"""The UNet's configuration: diffusers' JSON in and out, and what is refused."""

from __future__ import annotations

import json

import pytest
from diffusers import UNet2DConditionModel

from latentgen.errors import ConfigError
from latentgen.models.unet_config import UNetConfig


def test_reads_and_writes_what_diffusers_does(family_fields):
    oracle = UNet2DConditionModel.from_config(family_fields)
    config = UNetConfig.from_json(json.loads(oracle.to_json_string()))
    assert config == UNetConfig.from_json(family_fields)
    written = json.loads(json.dumps(config.to_json()))
    assert UNetConfig.from_json(written) == config
    ours = UNet2DConditionModel.from_config(written).config
    assert {name: ours[name] for name in family_fields} == family_fields


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
    ("fields", "named"),
    [
        ({"block_out_channels": [16384] * 3}, "parameters.*10,000,000,000"),
        ({"block_out_channels": [4096] * 3, "num_class_embeds": 10**6}, "parameters.*10,000,000,000"),
        (
            {"block_out_channels": [64, 64, 8192], "transformer_layers_per_block": 64},
            "parameters.*10,000,000,000",
        ),
        (
            {"layers_per_block": 4, "transformer_layers_per_block": 64},
            "transformer_layers_per_block.* 1,216 .*1,000",
        ),
        (
            {"block_out_channels": [2, 8, 8], "norm_num_groups": 1, "attention_head_dim": 1, "freq_shift": 1},
            "block_out_channels: 2 .*time embedding",
        ),
    ],
    ids=["stages", "class-table", "middle", "blocks", "narrow"],
)
def test_models_of_impossible_size_are_refused_before_they_are_built(sd1_fields, fields, named):
    with pytest.raises(ConfigError, match=named):
        UNetConfig.from_json(sd1_fields | fields)
