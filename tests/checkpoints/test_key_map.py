"""The key maps of the original layout against diffusers' converters and diffusers' own state dicts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from latentgen.checkpoints.key_map import (
    KeyMap,
    ema_key_map,
    openclip_key_map,
    original_key_maps,
    to_diffusers_names,
    to_original,
    unet_key_map,
    vae_key_map,
    with_prefix,
)
from latentgen.errors import CheckpointMismatchError, ConfigError
from latentgen.models.config import CLIPTextConfig, VAEConfig
from latentgen.models.unet_config import UNetConfig
from tests.models.conftest import FAMILIES

TOWER = {"num_hidden_layers": 2, "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
WITH_PROJECTION = {
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_act": "gelu",
    "projection_dim": 6,
}
TINY_VAE: dict[str, Any] = {
    "block_out_channels": [8, 16, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "layers_per_block": 2,
    "norm_num_groups": 4,
}


def random_original(key_map: KeyMap, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Random tensors in the original layout for a module with the given shapes of the diffusers layout."""
    torch.manual_seed(0)
    return to_original({name: torch.randn(shape) for name, shape in shapes.items()}, key_map)


def assert_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def unet_shapes(fields: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(dict(fields))
    return {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}


def tower_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The state dict of transformers' tower under the names that files have."""
    import transformers

    with torch.device("meta"):
        model = transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**config))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    "family", ["sd1", "sd2", "sdxl", "sdxl-refiner", "inpaint", "instruct-pix2pix", "x4-upscaler", "scalar"]
)
def test_unet_is_what_diffusers_makes_of_it(family: str) -> None:
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    fields = FAMILIES[family]
    config = UNetConfig.from_json(fields)
    key_map = unet_key_map(config)
    shapes = unet_shapes(fields)
    original = random_original(key_map, shapes)
    prefixed = {f"model.diffusion_model.{key}": tensor for key, tensor in original.items()}
    expected = convert_ldm_unet_checkpoint(prefixed, {"layers_per_block": 2, **fields})
    assert_equal(to_diffusers_names(original, key_map), expected)
    assert {name: tuple(tensor.shape) for name, tensor in expected.items()} == shapes


@pytest.mark.parametrize("changes", [{}, {"layers_per_block": 1}, {"block_out_channels": [8, 8, 16]}])
def test_vae_is_what_diffusers_makes_of_it(changes: dict[str, Any]) -> None:
    from diffusers import AutoencoderKL
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    fields = TINY_VAE | changes
    key_map = vae_key_map(VAEConfig.from_json(fields))
    with torch.device("meta"):
        vae = AutoencoderKL(**fields)
    shapes = {name: tuple(tensor.shape) for name, tensor in vae.state_dict().items()}
    original = random_original(key_map, shapes)
    assert original["encoder.mid.attn_1.q.weight"].shape == (16, 16, 1, 1)
    prefixed = {f"first_stage_model.{key}": tensor for key, tensor in original.items()}
    expected = convert_ldm_vae_checkpoint(prefixed, fields)
    assert_equal(to_diffusers_names(original, key_map), expected)
    assert {name: tuple(tensor.shape) for name, tensor in expected.items()} == shapes


def test_clip_tower_is_what_diffusers_makes_of_it() -> None:
    from diffusers.loaders.single_file_utils import convert_ldm_clip_checkpoint

    config = {"hidden_act": "quick_gelu", **TOWER}
    key_map = original_key_maps({"text_encoder": config})["text_encoder"]
    shapes = tower_shapes(config)
    del shapes["text_projection.weight"]
    original = random_original(key_map, shapes)
    assert_equal(to_diffusers_names(original, key_map), convert_ldm_clip_checkpoint(original))


def test_openclip_tower_is_what_diffusers_makes_of_it() -> None:
    import transformers
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

    config = TOWER | WITH_PROJECTION
    key_map = with_prefix(
        openclip_key_map(CLIPTextConfig.from_json(config)), "conditioner.embedders.1.model."
    )
    shapes = tower_shapes(config)
    original = random_original(key_map, shapes)
    assert original["conditioner.embedders.1.model.text_projection"].shape == (8, 6)
    assert original["conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight"].shape == (
        24,
        8,
    )
    with torch.device("meta"):
        model = transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**config))
    state = to_diffusers_names(original, key_map)
    assert_equal(to_original(state, key_map), original)
    expected = convert_open_clip_checkpoint(model, original, prefix="conditioner.embedders.1.model.")
    assert_equal(state, expected)
    assert {name: tuple(tensor.shape) for name, tensor in expected.items()} == shapes


@pytest.mark.parametrize(
    ("configs", "prefixes"),
    [
        ({"text_encoder": {"hidden_act": "quick_gelu"}}, {"text_encoder": "cond_stage_model.transformer."}),
        ({"text_encoder": {"hidden_act": "gelu"}}, {"text_encoder": "cond_stage_model.model."}),
        (
            {"text_encoder": {"hidden_act": "quick_gelu"}, "text_encoder_2": WITH_PROJECTION},
            {
                "text_encoder": "conditioner.embedders.0.transformer.",
                "text_encoder_2": "conditioner.embedders.1.model.",
            },
        ),
        ({"text_encoder_2": WITH_PROJECTION}, {"text_encoder_2": "conditioner.embedders.0.model."}),
        ({"scheduler": {}, "vae": TINY_VAE}, {"vae": "first_stage_model."}),
        ({"unet": FAMILIES["sd1"]}, {"unet": "model.diffusion_model."}),
    ],
)
def test_places_of_the_components(configs: dict[str, Any], prefixes: dict[str, str]) -> None:
    maps = original_key_maps(configs)
    assert maps.keys() == prefixes.keys()
    for component, key_map in maps.items():
        assert all(source.key.startswith(prefixes[component]) for source in key_map.values())


def test_moving_averages_have_no_dots() -> None:
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    fields = FAMILIES["sd1"]
    key_map = original_key_maps({"unet": fields})["unet"]
    averages = ema_key_map(key_map)
    shapes = unet_shapes(fields)
    plain, averaged = random_original(key_map, shapes), random_original(averages, shapes)
    averaged = {key: tensor + 1 for key, tensor in averaged.items()}
    expected = convert_ldm_unet_checkpoint(
        plain | averaged, {"layers_per_block": 2, **fields}, extract_ema=True
    )
    assert_equal(to_diffusers_names(averaged, averages), expected)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "no-middle"])
def test_maps_are_bijections_and_round_trips_the_identity(family: str) -> None:
    fields = FAMILIES[family]
    key_map = unet_key_map(UNetConfig.from_json(fields))
    assert len({source.key for source in key_map.values()}) == len(key_map)
    state = {name: torch.randn(shape) for name, shape in unet_shapes(fields).items()}
    assert_equal(to_diffusers_names(to_original(state, key_map), key_map), state)


def test_reading_makes_views() -> None:
    key_map = openclip_key_map(CLIPTextConfig.from_json(TOWER))
    original = {source.key: torch.zeros(24, 8) for source in key_map.values()}
    state = to_diffusers_names(original, key_map)
    for name in ("self_attn.k_proj.weight", "mlp.fc1.weight"):
        name = f"text_model.encoder.layers.0.{name}"
        storage = original[key_map[name].key].untyped_storage()
        assert state[name].untyped_storage().data_ptr() == storage.data_ptr()
        assert state[name].is_contiguous()


def test_other_tensors_are_refused() -> None:
    key_map = openclip_key_map(CLIPTextConfig.from_json(TOWER))
    state = {name: torch.zeros(1) for name in key_map}
    with pytest.raises(CheckpointMismatchError, match="'more'"):
        to_original({**state, "more": torch.zeros(1)}, key_map)
    original = {source.key: torch.zeros(3) for source in key_map.values()}
    del original["ln_final.bias"]
    with pytest.raises(CheckpointMismatchError, match=r"'ln_final\.bias'"):
        to_diffusers_names(original, key_map)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [(FAMILIES["no-middle"], "mid_block_type"), (FAMILIES["sdxl"] | {"num_class_embeds": 3}, "label_emb")],
)
def test_what_the_original_layout_cannot_hold(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        unet_key_map(UNetConfig.from_json(fields))
