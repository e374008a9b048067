"""The configurations of published checkpoints, field for field as they stand in their repositories."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from latentgen.checkpoints.families import read_config
from latentgen.models.config import CLIPTextConfig, StageConfig, VAEConfig
from latentgen.models.text_loading import build_model
from latentgen.models.unet import UNet
from latentgen.models.unet_config import UNetConfig
from latentgen.models.vae import VAEDecoder, VAEEncoder

_DOWN, _UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
_SD14: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.2.2",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": [_DOWN, _DOWN, _DOWN, "DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D", _UP, _UP, _UP],
}
_SD21 = _SD14 | {
    "_diffusers_version": "0.10.0.dev0",
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "dual_cross_attention": False,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "sample_size": 96,
    "upcast_attention": True,
    "use_linear_projection": True,
}
# What later releases of diffusers add, as they write it.
_LATER: dict[str, Any] = {
    "_name_or_path": "./unet",
    "addition_embed_type": None,
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": None,
    "attention_type": "default",
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "dropout": 0.0,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "mid_block_only_cross_attention": None,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "num_attention_heads": None,
    "projection_class_embeddings_input_dim": None,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "reverse_transformer_layers_per_block": None,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "transformer_layers_per_block": 1,
}
_SDXL = (
    _SD21
    | _LATER
    | {
        "_diffusers_version": "0.19.0.dev0",
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "attention_head_dim": [5, 10, 20],
        "block_out_channels": [320, 640, 1280],
        "cross_attention_dim": 2048,
        "down_block_types": ["DownBlock2D", _DOWN, _DOWN],
        "projection_class_embeddings_input_dim": 2816,
        "sample_size": 128,
        "transformer_layers_per_block": [1, 2, 10],
        "up_block_types": [_UP, _UP, "UpBlock2D"],
        "upcast_attention": None,
    }
)
_REFINER = _SDXL | {
    "attention_head_dim": [6, 12, 24, 24],
    "block_out_channels": [384, 768, 1536, 1536],
    "cross_attention_dim": 1280,
    "down_block_types": ["DownBlock2D", _DOWN, _DOWN, "DownBlock2D"],
    "projection_class_embeddings_input_dim": 2560,
    "transformer_layers_per_block": 4,
    "up_block_types": ["UpBlock2D", _UP, _UP, "UpBlock2D"],
}

_VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.2.2",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
_VAE_SDXL = _VAE | {
    "_name_or_path": "../sdxl-vae/",
    "force_upcast": True,
    "latents_mean": None,
    "latents_std": None,
    "mid_block_add_attention": True,
    "norm_num_groups": 32,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
    "shift_factor": None,
    "use_post_quant_conv": True,
    "use_quant_conv": True,
}
_VAE_X4 = _VAE | {
    "block_out_channels": [128, 256, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "norm_num_groups": 32,
    "sample_size": 256,
    "scaling_factor": 0.08333,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
}

_CLIP_L: dict[str, Any] = {
    "_name_or_path": "openai/clip-vit-large-patch14",
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "torch_dtype": "float32",
    "transformers_version": "4.21.0.dev0",
    "vocab_size": 49408,
}
_OPENCLIP_H = _CLIP_L | {
    "_name_or_path": "hf-models/stable-diffusion-v2-768x768/text_encoder",
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 23,
    "projection_dim": 512,
}


@pytest.mark.parametrize(
    ("networks", "fields", "count"),
    [
        ([UNet], _SD14, 859_520_964),
        ([UNet], _SD14 | _LATER, 859_520_964),
        ([UNet], _SD14 | {"in_channels": 9}, 859_535_364),
        ([UNet], _SD14 | {"time_cond_proj_dim": 256}, 859_520_964 + 256 * 320),
        ([UNet], _SD21, 865_910_724),
        ([UNet], _SD21 | _LATER, 865_910_724),
        ([UNet], _SDXL, 2_567_463_684),
        ([UNet], _REFINER, 2_259_526_660),
        ([UNet], read_config("x4-upscaler/unet/config.json"), 473_398_020),
        ([VAEEncoder, VAEDecoder], _VAE, 83_653_863),
        ([VAEEncoder, VAEDecoder], _VAE_SDXL, 83_653_863),
        ([VAEEncoder, VAEDecoder], _VAE_X4, 55_325_927),
        ([build_model], _CLIP_L, 123_060_480),
        ([build_model], _CLIP_L | {"architectures": None, "dtype": "float16"}, 123_060_480),
        ([build_model], _OPENCLIP_H, 340_387_840),
    ],
)
def test_numbers_of_parameters(networks: list[Callable[[Any], nn.Module]], fields: Any, count: int) -> None:
    kind = {UNet: UNetConfig, VAEEncoder: VAEConfig, build_model: CLIPTextConfig}[networks[0]]
    with torch.device("meta"):
        modules = [build(kind.from_json(fields)) for build in networks]
    assert sum(parameter.numel() for module in modules for parameter in module.parameters()) == count


@pytest.mark.parametrize(
    ("folder", "kind", "fields"),
    [
        ("sd15/unet", UNetConfig, _SD14),
        ("sd21/unet", UNetConfig, _SD21),
        ("sdxl/unet", UNetConfig, _SDXL),
        ("sdxl-refiner/unet", UNetConfig, _REFINER),
        ("sd15/vae", VAEConfig, _VAE),
        ("sdxl/vae", VAEConfig, _VAE_SDXL),
        ("x4-upscaler/vae", VAEConfig, _VAE_X4),
        ("sdxl/text_encoder", CLIPTextConfig, _CLIP_L | {"projection_dim": 768}),
        ("sd21/text_encoder", CLIPTextConfig, _OPENCLIP_H),
    ],
)
def test_bundled_configurations_are_the_published_ones(
    folder: str, kind: type[StageConfig], fields: dict[str, Any]
) -> None:
    assert kind.from_json(read_config(f"{folder}/config.json")) == kind.from_json(fields)
