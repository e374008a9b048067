"""Tiny models of every family's structure, made by diffusers and transformers, through a single file and back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from latentgen.checkpoints.families import COMPONENT_CLASSES
from latentgen.checkpoints.key_map import original_key_maps
from latentgen.checkpoints.single_file import SingleFile
from latentgen.checkpoints.weights import Weights
from latentgen.files import write_json
from latentgen.models.unet import UNet
from latentgen.models.unet_config import UNetConfig
from tests.checkpoints.single_files import to_original_file
from tests.models.conftest import FAMILIES as UNETS

TOWER = {"num_hidden_layers": 2, "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 50}
CLIP = TOWER | {"hidden_act": "quick_gelu", "hidden_size": 8, "architectures": ["CLIPTextModel"]}
OPENCLIP = CLIP | {"hidden_act": "gelu", "hidden_size": 12}
BIG_G = OPENCLIP | {"architectures": ["CLIPTextModelWithProjection"], "projection_dim": 6}
VAE: dict[str, Any] = {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 4,
}
TOWERS: dict[str, dict[str, dict[str, Any]]] = {
    "sd1": {"text_encoder": CLIP},
    "sd2": {"text_encoder": OPENCLIP},
    "sdxl": {"text_encoder": CLIP, "text_encoder_2": BIG_G},
    "sdxl-refiner": {"text_encoder_2": BIG_G},
    "inpaint": {"text_encoder": CLIP},
    "instruct-pix2pix": {"text_encoder": CLIP},
    "x4-upscaler": {"text_encoder": OPENCLIP},
}


def build(component: str, config: Mapping[str, Any]) -> nn.Module:
    import transformers
    from diffusers import AutoencoderKL, UNet2DConditionModel

    match component:
        case "unet":
            return UNet2DConditionModel.from_config(dict(config))
        case "vae":
            return AutoencoderKL.from_config(dict(config))
        case _:
            projected = config["architectures"] == ["CLIPTextModelWithProjection"]
            model = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
            return model(transformers.CLIPTextConfig(**config))


def on_disk(name: str) -> str:
    """The name that a tensor of a text tower has in files, whatever the release of transformers."""
    return name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}"


def load_tower(weights: Weights, model: nn.Module) -> dict[str, Tensor]:
    names = {on_disk(name): name for name in model.state_dict()}
    weights.load_into(model, rename=lambda name: names[name])
    return {on_disk(name): tensor for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("family", TOWERS)
def test_a_single_file_gives_the_weights_that_diffusers_made(tmp_path: Path, family: str) -> None:
    torch.manual_seed(0)
    configs = {"unet": UNETS[family], "vae": VAE, **TOWERS[family]}
    models = {component: build(component, config) for component, config in configs.items()}
    states: dict[str, dict[str, Tensor]] = {
        component: {
            on_disk(name) if component.startswith("text") else name: torch.randn_like(tensor)
            for name, tensor in model.state_dict().items()
        }
        for component, model in models.items()
    }
    path, folder = tmp_path / "model.safetensors", tmp_path / "configs"
    save_file(to_original_file(states, configs), path)
    for component, config in configs.items():
        write_json(folder / component / "config.json", config)
    write_json(
        folder / "model_index.json", {component: list(COMPONENT_CLASSES[component]) for component in configs}
    )

    file = SingleFile.open(path, config=folder)
    for component, model in models.items():
        if component.startswith("text"):
            found = load_tower(file.weights(component), model)
        else:
            if component == "unet":
                with torch.device("meta"):
                    model = UNet(UNetConfig.from_json(file.config("unet")))
            file.weights(component).load_into(model)
            found = model.state_dict()
        assert found.keys() == states[component].keys()
        for name, tensor in found.items():
            assert torch.equal(tensor, states[component][name]), name


def test_fused_projections_stay_in_the_pages_of_the_file(tmp_path: Path) -> None:
    """Queries, keys and values are views of one tensor of the file, side by side."""
    model = build("text_encoder_2", BIG_G)
    state = {on_disk(name): tensor for name, tensor in model.state_dict().items()}
    path = tmp_path / "model.safetensors"
    tensors = to_original_file({"text_encoder_2": state}, {"text_encoder_2": BIG_G})
    save_file(tensors, path)
    weights = Weights((path,), original_key_maps({"text_encoder_2": BIG_G})["text_encoder_2"])
    found = load_tower(weights, build("text_encoder_2", BIG_G))
    attention = "text_model.encoder.layers.1.self_attn"
    query, key, value = (found[f"{attention}.{part}_proj.weight"] for part in "qkv")
    assert key.data_ptr() - query.data_ptr() == value.data_ptr() - key.data_ptr() == query.nbytes
    assert {info.shape for name, info in weights.tensors().items() if "q_proj.weight" in name} == {(12, 12)}
    assert sum(info.nbytes for info in weights.tensors().values()) == sum(t.nbytes for t in tensors.values())
