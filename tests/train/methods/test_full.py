"""What full fine-tuning saves, as diffusers loads it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.train.finetuning import build, folder_of, objective_of
from tests.train.recipes import plan_for

FAMILIES = ("sd", "sdxl", "inpainting", "instruct")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_folder_is_of_the_same_class_with_the_new_weights(family: str, tmp_path: Path):
    import diffusers

    objective = objective_of({"kind": "full", "train_text_encoder": True}, folder_of(family), tmp_path)
    state = objective.state_dict()
    with torch.no_grad():
        new = {name: tensor + 0.01 for name, tensor in state.items() if tensor.is_floating_point()}
    objective.save(tmp_path / "model", {**state, **new})
    before, after = (
        json.loads((path / "model_index.json").read_text())
        for path in (folder_of(family), tmp_path / "model")
    )
    assert after["_class_name"] == before["_class_name"]
    pipe = getattr(diffusers, after["_class_name"]).from_pretrained(tmp_path / "model")
    for name, tensor in pipe.unet.state_dict().items():
        assert torch.equal(tensor, new[f"unet.{name}"]), name
    assert pipe.scheduler.config["prediction_type"] == "epsilon"
    old = build(family)
    for name, tensor in pipe.vae.state_dict().items():
        assert torch.equal(tensor, old.vae.state_dict()[name]), name  # which does not learn
    for number, tower in enumerate(
        ("text_encoder", "text_encoder_2") if family == "sdxl" else ("text_encoder",)
    ):
        prefix = f"text_encoder.{number}." if family == "sdxl" else "text_encoder."
        for name, tensor in pipe.components[tower].state_dict().items():
            assert torch.equal(tensor, new[prefix + name]), name


def test_half_precision_halves_the_files_and_the_guidance_scale_is_kept(tmp_path: Path):
    objective = objective_of({"kind": "full"}, folder_of("sd"), tmp_path, save_half=True, guidance_scale=2.5)
    objective.save(tmp_path / "model", objective.state_dict())
    for file in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
        tensors = load_file(tmp_path / "model" / f"{file}.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert json.loads((tmp_path / "model" / "model_index.json").read_text())["_guidance_scale"] == 2.5


def test_nothing_learns_that_never_gets_a_gradient(tmp_path: Path):
    """Of SDXL's first text encoder the last layer is passed over."""
    objective = objective_of({"kind": "full", "train_text_encoder": True}, folder_of("sdxl"), tmp_path)
    objective(*objective.batch(plan_for(objective))).total.backward()
    for name, parameter in objective.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    frozen = {name for name, parameter in objective.named_parameters() if not parameter.requires_grad}
    assert frozen
    assert all(name.startswith("text_encoder.0.") for name in frozen)
