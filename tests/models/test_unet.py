"""The UNet of every family against diffusers, and the identities of its two-part computation."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from latentgen.errors import InputError
from latentgen.models.attention import Attention
from latentgen.models.unet import AddedConditioning, UNet
from latentgen.models.unet_config import UNetConfig, parameter_count
from tests.models.unet_families import FAMILIES, SD1, SDXL, build_inputs


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def build_pair(fields: dict[str, Any]) -> tuple[UNet, UNet2DConditionModel]:
    """A UNet and diffusers' own, with the same random weights."""
    torch.manual_seed(0)
    oracle = UNet2DConditionModel.from_config(fields).eval()
    for parameter in oracle.parameters():
        # Fresh biases are zero and norms are one: a swap among them would go unseen.
        torch.nn.init.normal_(parameter, std=0.02) if parameter.ndim > 1 else parameter.data.add_(
            0.1 * torch.randn_like(parameter)
        )
    unet = UNet(UNetConfig.from_json(fields))
    unet.load_state_dict(oracle.state_dict(), strict=True)
    return unet.eval(), oracle


def run_oracle(oracle: UNet2DConditionModel, inputs: dict[str, Any]) -> torch.Tensor:
    added = inputs.get("added")
    return oracle(
        inputs["sample"],
        inputs["timestep"],
        encoder_hidden_states=inputs["context"],
        class_labels=inputs.get("class_labels"),
        added_cond_kwargs=added._asdict() if added is not None else None,
    ).sample


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_agrees_with_diffusers(family):
    unet, oracle = build_pair(FAMILIES[family])
    inputs = build_inputs(unet.config)
    assert relative_error(unet(**inputs), run_oracle(oracle, inputs)) < 1e-5
