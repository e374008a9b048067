"""What LoRA training saves, in diffusers and here, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from latentgen.adapters.lora_files import read_lora
from latentgen.errors import ConfigError
from latentgen.pipelines.text_to_image import TextToImagePipeline
from latentgen.train.methods.lora import DIFFUSERS_FILE, KOHYA_FILE
from latentgen.train.objectives.finetune import FinetuneObjective
from tests.train.finetuning import build, folder_of, objective_of, randomize
from tests.train.oracles import images_of
from tests.train.recipes import plan_for

METHOD = {"kind": "lora", "rank": 3, "alpha": 2.0, "train_text_encoder": True}
EVERYWHERE = METHOD | {
    "targets": ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "proj_in"],
    "text_targets": ["q_proj", "out_proj", "fc1", "fc2"],
}
FILES = (DIFFUSERS_FILE, KOHYA_FILE)


def trained(method: dict[str, Any], family: str, tmp_path: Path, **fields: Any) -> FinetuneObjective:
    objective = objective_of(method, folder_of(family), tmp_path, **fields)
    randomize(objective)
    return objective


def image_of(pipeline: Any) -> np.ndarray:
    return images_of(pipeline, "red cat", guidance_scale=3.0)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.parametrize("method", [METHOD, EVERYWHERE], ids=["attention", "everywhere"])
def test_all_readers_draw_the_same(family: str, method: dict[str, Any], tmp_path: Path):
    objective = trained(method, family, tmp_path)
    objective.save(tmp_path / "model", objective.state_dict())
    plain = TextToImagePipeline.from_pretrained(folder_of(family), dtype="float32", device="cpu")
    expected = image_of(objective.eval().pipeline())  # the networks that were trained, with PEFT inside
    assert np.abs(image_of(plain) - expected).max() > 0.01, "the LoRA makes no difference"
    assert np.abs(image_of(plain.with_lora(tmp_path / "model")) - expected).max() < 1e-4
    for file in FILES:
        assert np.abs(image_of(plain.with_lora(tmp_path / "model" / file)) - expected).max() < 1e-4
        pipe = build(family)
        pipe.load_lora_weights(tmp_path / "model", weight_name=file)
        assert np.abs(image_of(pipe) - expected).max() < 1e-4


def test_diffusers_finds_the_file_in_the_folder(tmp_path: Path):
    objective = trained(METHOD, "sd", tmp_path)
    objective.save(tmp_path / "model", objective.state_dict())
    pipe = build("sd")
    pipe.load_lora_weights(tmp_path / "model")
    assert pipe.unet.peft_config["default_0"].lora_alpha == 2.0


@pytest.mark.parametrize(
    ("family", "prefixes"),
    [
        ("sd", {"lora_unet_down_blocks_0_attentions_0_", "lora_te_text_model_encoder_layers_0_"}),
        (
            "sdxl",
            {
                "lora_unet_input_blocks_4_1_",
                "lora_te1_text_model_encoder_layers_0_",
                "lora_te2_text_model_encoder_layers_0_",
            },
        ),
    ],
)
def test_kohya_names(family: str, prefixes: set[str], tmp_path: Path):
    objective = trained(METHOD, family, tmp_path, save_half=True)
    objective.save(tmp_path / "model", objective.state_dict())
    tensors = load_file(tmp_path / "model" / KOHYA_FILE)
    for prefix in prefixes:
        assert any(key.startswith(prefix) for key in tensors), prefix
    assert all(key.endswith((".lora_down.weight", ".lora_up.weight", ".alpha")) for key in tensors)
    assert {float(tensor) for key, tensor in tensors.items() if key.endswith(".alpha")} == {2.0}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    with safe_open(tmp_path / "model" / KOHYA_FILE, "pt") as file:
        assert file.metadata()["ss_network_dim"] == "3"
    assert read_lora(tmp_path / "model" / KOHYA_FILE).format == "kohya"


@pytest.mark.parametrize("file", FILES)
def test_going_on_from_a_lora(file: str, tmp_path: Path):
    first = trained(METHOD, "sd", tmp_path)
    first.save(tmp_path / "model", first.state_dict())
    again = objective_of(
        METHOD | {"alpha": 4.0, "init_lora": tmp_path / "model" / file}, folder_of("sd"), tmp_path
    )
    assert np.abs(image_of(again.eval().pipeline()) - image_of(first.eval().pipeline())).max() < 1e-5


def test_dropout_drops(tmp_path: Path):
    objective = trained(METHOD | {"dropout": 0.5}, "sd", tmp_path)
    batch = objective.batch(plan_for(objective))
    losses = {objective.train()(*batch).total.item() for _ in range(3)}
    assert len(losses) == 3
    assert len({objective.eval()(*batch).total.item() for _ in range(3)}) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": ["to_x"]}, r"task\.method\.targets: 'to_x' .*to_q"),
        ({"targets": ["norm1"]}, r"task\.method\.targets: 'norm1'"),
        ({"text_targets": ["to_q"]}, r"task\.method\.text_targets: 'to_q' .*q_proj"),
    ],
)
def test_targets_that_are_not_there(changes: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=message):
        objective_of(METHOD | changes, folder_of("sd"), tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 5}, "has rank 3, the recipe 5"),
        ({"train_text_encoder": False}, "adapts text_encoder"),
        ({"targets": ["to_q"]}, "adapts unet"),
    ],
)
def test_loras_that_cannot_go_on(changes: dict[str, Any], message: str, tmp_path: Path):
    first = trained(METHOD, "sd", tmp_path)
    first.save(tmp_path / "model", first.state_dict())
    with pytest.raises(ConfigError, match=message):
        objective_of(METHOD | changes | {"init_lora": tmp_path / "model"}, folder_of("sd"), tmp_path)
