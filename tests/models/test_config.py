"""The configurations of the networks: diffusers' JSON in and out, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from diffusers import AutoencoderKL, UNet2DConditionModel

from latentgen.errors import ConfigError
from latentgen.models.config import CLIPTextConfig, StageConfig, VAEConfig
from latentgen.models.unet_config import UNetConfig
from tests.models.conftest import FAMILIES
from tests.models.test_vae import FORMS, TINY

SD1 = FAMILIES["sd1"]
NAN, INF = float("nan"), float("inf")
BAD: dict[type[StageConfig], tuple[dict[str, Any], dict[str, list[Any]]]] = {
    UNetConfig: (
        SD1,
        {
            "unknown_field": [1],
            "in_channels": ["4", True, 0, 10**9],
            "norm_eps": [NAN, INF, -1e-5],
            "norm_num_groups": [None],
            "block_out_channels": [[], [16, 30, 32], [16, 32], 16],
            "down_block_types": [["AttnDownBlock2D"] * 3],
            "up_block_types": [["UpBlock2D"] * 2],
            "layers_per_block": [[1, 1], 1000],
            "attention_head_dim": [5, [4, 4]],
            "transformer_layers_per_block": [[[1, 1], 1, 1], 10**6],
            "only_cross_attention": [[True]],
            "mid_block_type": ["UNetMidBlock2DSimpleCrossAttn"],
            "mid_block_scale_factor": [2],
            "act_fn": ["mish"],
            "dropout": [0.1],
            "class_embed_type": ["simple_projection", "projection"],
            "addition_embed_type": ["image", "text_time"],
            "time_cond_proj_dim": [3],
            "encoder_hid_dim": [64],
            "conv_in_kernel": [1],
            "resnet_time_scale_shift": ["ada_group"],
        },
    ),
    VAEConfig: (
        TINY,
        {
            "unknown_field": [1],
            "latent_channels": ["4", 0],
            "scaling_factor": [NAN, 0, -1.0],
            "block_out_channels": [[16, 32], [16, 30, 48], []],
            "layers_per_block": [10**6],
            "down_block_types": [["AttnDownEncoderBlock2D"] * 3],
            "act_fn": ["mish"],
            "shift_factor": [0.1],
            "latents_mean": [[0.0]],
            "use_quant_conv": [False],
        },
    ),
    CLIPTextConfig: (
        {},
        {
            "hidden_size": [33, -1, "32"],
            "layer_norm_eps": [NAN],
            "num_hidden_layers": [10**6],
            "hidden_act": ["relu6"],
            "use_attention_mask": [True],
            "architectures": [["CLIPModel"]],
        },
    ),
}


@pytest.mark.parametrize(
    ("kind", "oracle", "fields"),
    [
        *((UNetConfig, UNet2DConditionModel, fields) for fields in FAMILIES.values()),
        *((VAEConfig, AutoencoderKL, fields) for fields in FORMS.values()),
    ],
    ids=[*FAMILIES, *FORMS],
)
def test_reads_and_writes_what_diffusers_does(kind: Any, oracle: Any, fields: dict[str, Any]) -> None:
    config = kind.from_json(json.loads(oracle.from_config(fields).to_json_string()))
    assert config == kind.from_json(fields)
    written = json.loads(json.dumps(config.to_json()))
    assert kind.from_json(written) == config
    ours = oracle.from_config(written).config
    assert {name: ours[name] for name in fields} == fields


def test_metadata_of_the_file_is_ignored() -> None:
    metadata = {"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.6.0", "_name_or_path": "x"}
    assert UNetConfig.from_json(SD1 | metadata) == UNetConfig.from_json(SD1)


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (kind, field, value)
        for kind, (_, bad) in BAD.items()
        for field, values in bad.items()
        for value in values
    ],
)
def test_bad_fields_are_named(kind: type[StageConfig], field: str, value: Any) -> None:
    fields, _ = BAD[kind]
    with pytest.raises(ConfigError, match=field.removesuffix("s")):
        kind.from_json(fields | {field: value})


@pytest.mark.parametrize(
    ("kind", "fields", "named"),
    [
        (UNetConfig, SD1 | {"block_out_channels": [16384] * 3}, "parameters.*10,000,000,000"),
        (
            UNetConfig,
            SD1 | {"block_out_channels": [4096] * 3, "num_class_embeds": 10**6},
            "parameters.*10,000,000,000",
        ),
        (
            UNetConfig,
            SD1 | {"block_out_channels": [64, 64, 8192], "transformer_layers_per_block": 64},
            "parameters.*10,000,000,000",
        ),
        (
            UNetConfig,
            SD1 | {"layers_per_block": 4, "transformer_layers_per_block": 64},
            "transformer_layers_per_block.* 1,216 .*1,000",
        ),
        (
            UNetConfig,
            SD1
            | {
                "block_out_channels": [2, 8, 8],
                "norm_num_groups": 1,
                "attention_head_dim": 1,
                "freq_shift": 1,
            },
            "block_out_channels: 2 .*time embedding",
        ),
        (VAEConfig, TINY | {"block_out_channels": [8192] * 3}, "parameters.*1,000,000,000"),
        (
            CLIPTextConfig,
            {"hidden_size": 16384, "intermediate_size": 65536, "num_hidden_layers": 1024},
            "parameters.*7,000,000,000",
        ),
    ],
    ids=["stages", "class-table", "middle", "blocks", "narrow", "vae", "text"],
)
def test_models_of_impossible_size_are_refused_before_they_are_built(
    kind: type[StageConfig], fields: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        kind.from_json(fields)
