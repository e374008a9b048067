"""The names of layers in LoRA files; tests/test_original_layout.py compares those of the original layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from latentgen.adapters.lora import attach
from latentgen.adapters.lora_files import read_lora
from latentgen.adapters.lora_layers import AdaptedLayer, flat, layer_names, original_paths
from latentgen.models.unet import AddedConditioning, UNet
from latentgen.models.unet_config import UNetConfig
from tests.models.conftest import FAMILIES


def _unet(family: str, device: str = "meta") -> UNet:
    with torch.device(device):
        return UNet(UNetConfig.from_json(FAMILIES[family]))


def _layer_paths(module: nn.Module) -> list[str]:
    return [path for path, layer in module.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]


@pytest.mark.parametrize("family", ["sd1", "sdxl", "sdxl-refiner", "x4-upscaler"])
def test_every_layer_has_its_names_alone(family: str):
    unet = _unet(family)
    originals, names, paths = original_paths(unet.config), layer_names(unet), _layer_paths(unet)
    for path in paths:
        original = originals[path]
        assert {names[path.replace(".", "_")], names[original.replace(".", "_")]} == {path}
    assert len(names) == 2 * len(paths)


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
