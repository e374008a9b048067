"""The names of layers in LoRA files; tests/test_original_layout.py compares those of the original layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from latentgen.adapters.lora import attach, read_lora
from latentgen.adapters.lora_layers import AdaptedLayer, flat, layer_names, original_paths
from latentgen.models.unet import AddedConditioning, UNet
from latentgen.models.unet_config import UNetConfig

_DOWN, _UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
_SD1: dict[str, Any] = {
    "block_out_channels": [16, 32, 32, 32],
    "down_block_types": [_DOWN, _DOWN, _DOWN, "DownBlock2D"],
    "up_block_types": ["UpBlock2D", _UP, _UP, _UP],
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
_SDXL = _SD1 | {
    "block_out_channels": [16, 32, 32],
    "down_block_types": ["DownBlock2D", _DOWN, _DOWN],
    "up_block_types": [_UP, _UP, "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 3],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 20 + 6 * 8,
}
FAMILIES = {
    "sd1": _SD1,
    "sdxl": _SDXL,
    "refiner": _SDXL
    | {
        "block_out_channels": [16, 32, 64, 64],
        "down_block_types": ["DownBlock2D", _DOWN, _DOWN, "DownBlock2D"],
        "up_block_types": ["UpBlock2D", _UP, _UP, "UpBlock2D"],
        "transformer_layers_per_block": 4,
    },
    "x4-upscaler": _SD1
    | {
        "in_channels": 7,
        "down_block_types": ["DownBlock2D", _DOWN, _DOWN, _DOWN],
        "up_block_types": [_UP, _UP, _UP, "UpBlock2D"],
        "num_class_embeds": 10,
    },
    "three-layers": _SD1 | {"layers_per_block": 3},
}


def _unet(family: str, device: str = "meta") -> UNet:
    with torch.device(device):
        return UNet(UNetConfig.from_json(FAMILIES[family]))


def _layer_paths(module: nn.Module) -> list[str]:
    return [path for path, layer in module.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_has_its_names_alone(family: str):
    unet = _unet(family)
    originals, names, paths = original_paths(unet.config), layer_names(unet), _layer_paths(unet)
    for path in paths:
        original = originals[path]
        assert {names[path.replace(".", "_")], names[original.replace(".", "_")]} == {path}
    assert len(names) == 2 * len(paths)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("input_blocks_4_1_proj_out", "down_blocks.1.attentions.0.proj_out"),
        ("middle_block_1_proj_in", "mid_block.attentions.0.proj_in"),
        ("output_blocks_2_2_conv", "up_blocks.0.upsamplers.0.conv"),
        ("input_blocks_3_0_op", "down_blocks.0.downsamplers.0.conv"),
        ("input_blocks_7_0_in_layers_2", "down_blocks.2.resnets.0.conv1"),
        ("output_blocks_8_0_skip_connection", "up_blocks.2.resnets.2.conv_shortcut"),
        ("label_emb_0_2", "add_embedding.linear_2"),
        ("out_2", "conv_out"),
    ],
)  # fmt: skip
def test_known_names_of_sdxl(name: str, path: str):
    assert layer_names(_unet("sdxl"))[name] == path


def _tree(*paths: str) -> nn.Module:
    root = nn.Module()
    for path in paths:
        *parents, name = path.split(".")
        module = root
        for parent in parents:
            if parent not in dict(module.named_children()):
                module.add_module(parent, nn.Module())
            module = module.get_submodule(parent)
        module.add_module(name, nn.Linear(2, 2))
    return root


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_text_encoders_of_any_version_are_found(prefix: str):
    names = layer_names(_tree(f"{prefix}encoder.layers.0.mlp.fc1", "text_projection"))
    assert names[flat("text_model_encoder_layers_0_mlp_fc1")] == f"{prefix}encoder.layers.0.mlp.fc1"
    assert names[flat("text_model.encoder.layers.0.mlp.fc1")] == f"{prefix}encoder.layers.0.mlp.fc1"
    assert names[flat("encoder.layers.0.mlp.fc1")] == f"{prefix}encoder.layers.0.mlp.fc1"
    assert names[flat("text_projection")] == "text_projection"


def test_a_name_of_two_layers_is_of_none():
    assert layer_names(_tree("a.b_c", "a_b.c", "d")) == {"d": "d"}


def test_what_cannot_be_adapted_has_no_name():
    root = nn.Module()
    root.add_module("grouped", nn.Conv2d(4, 4, 1, groups=2))
    root.add_module("norm", nn.LayerNorm(2))
    root.add_module("table", nn.Embedding(2, 2))
    root.add_module("adapted", AdaptedLayer(nn.Linear(2, 2)))
    assert layer_names(root) == {"adapted": "adapted"}


def test_all_names_of_a_layer_give_the_same_result(tmp_path: Path):
    torch.manual_seed(0)
    unet = _unet("sdxl", "cpu").eval().requires_grad_(False)
    originals = original_paths(unet.config)
    factors = {
        path: (
            torch.randn(2, *weight.shape[1:]) / 8,
            torch.randn(weight.shape[0], 2, *(1,) * (weight.ndim - 2)) / 8,
        )
        for path in _layer_paths(unet)
        if isinstance(weight := unet.get_submodule(path).weight, torch.Tensor)
    }
    schemes = {
        "original": lambda path: f"lora_unet_{originals[path]}".replace(".", "_") + ".lora_{}.weight",
        "kohya": lambda path: f"lora_unet_{path}".replace(".", "_") + ".lora_{}.weight",
        "diffusers": lambda path: f"unet.{path}.lora.{{}}.weight",
    }
    outputs = []
    sample, context = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 24)
    added = AddedConditioning(torch.randn(1, 20), torch.ones(1, 6))
    plain = unet(sample, 3, context, added=added)
    for name, scheme in schemes.items():
        tensors = {
            scheme(path).format(role): factor
            for path, pair in factors.items()
            for role, factor in zip(("down", "up"), pair, strict=True)
        }
        save_file(tensors, tmp_path / f"{name}.safetensors")
        adapted = _unet("sdxl", "cpu").eval().requires_grad_(False)
        adapted.load_state_dict(unet.state_dict())
        attach({"unet": adapted}, read_lora(tmp_path / f"{name}.safetensors"))
        outputs.append(adapted(sample, 3, context, added=added))
    assert (outputs[0] - plain).abs().max() > 0.01
    for other in outputs[1:]:
        torch.testing.assert_close(other, outputs[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layer", [nn.Linear(6, 4), nn.Conv2d(6, 4, 1)])
@pytest.mark.parametrize("trailing", [(), (1, 1)])
def test_a_projection_takes_matrices_and_1x1_convolutions(
    tmp_path: Path, layer: nn.Module, trailing: tuple[int, ...]
):
    down, up = torch.randn(2, 6, *trailing), torch.randn(4, 2, *trailing)
    save_file(
        {"lora_unet_proj_in.lora_down.weight": down, "lora_unet_proj_in.lora_up.weight": up},
        tmp_path / "style.safetensors",
    )
    root = nn.Module()
    root.add_module("proj_in", layer)
    x = torch.randn(3, 6, 5, 7) if isinstance(layer, nn.Conv2d) else torch.randn(3, 5, 6)
    channels = 1 if isinstance(layer, nn.Conv2d) else -1
    product = (up.flatten(1) @ down.flatten(1)) @ x.movedim(channels, -1)[..., None]
    expected = layer(x) + product.squeeze(-1).movedim(-1, channels)
    attach({"unet": root}, read_lora(tmp_path / "style.safetensors"))
    torch.testing.assert_close(root.get_submodule("proj_in")(x), expected, rtol=1e-5, atol=1e-5)
