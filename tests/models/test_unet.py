"""The UNet of every family against diffusers, and the identities of its two-part computation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from latentgen.errors import InputError
from latentgen.models.attention import Attention
from latentgen.models.unet import AddedConditioning, UNet
from latentgen.models.unet_config import UNetConfig
from tests.models.conftest import relative_error

POOLED = 20
ADDED = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": POOLED + 6 * 8,
}


def build_pair(fields: dict[str, Any]) -> tuple[UNet, UNet2DConditionModel]:
    """A UNet and diffusers' own, with the same random weights."""
    torch.manual_seed(0)
    oracle = UNet2DConditionModel.from_config(fields).eval()
    with torch.no_grad():
        # New norms are all ones and zeros: without this a swap among them would go unseen.
        for parameter in oracle.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    unet = UNet(UNetConfig.from_json(fields))
    unet.load_state_dict(oracle.state_dict(), strict=True)
    return unet.eval(), oracle


def build_inputs(config: UNetConfig, *, batch: int = 2, size: tuple[int, int] = (8, 8)) -> dict[str, Any]:
    """Random arguments for `UNet.forward`, the same at every call."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    inputs: dict[str, Any] = {
        "sample": normal(batch, config.in_channels, *size),
        "timestep": torch.linspace(981, 21, batch),
        "context": normal(batch, 7, config.cross_attention_dim),
    }
    projected = config.projection_class_embeddings_input_dim or 0
    match config.class_embed_type:
        case "timestep":
            inputs["class_labels"] = torch.linspace(0.5, 300, batch)
        case "projection":
            inputs["class_labels"] = normal(batch, projected)
        case "identity":
            inputs["class_labels"] = normal(batch, config.time_embed_dim)
        case None if config.num_class_embeds is not None:
            inputs["class_labels"] = torch.arange(batch) + 3
    if config.addition_time_embed_dim is not None:
        ids = torch.rand(batch, (projected - POOLED) // config.addition_time_embed_dim, generator=generator)
        inputs["added"] = AddedConditioning(normal(batch, POOLED), 1024 * ids)
    if config.time_cond_proj_dim is not None:
        inputs["guidance_scale"] = torch.linspace(1, 14, batch)
    return inputs


def in_float64(value: Any) -> Any:
    if isinstance(value, AddedConditioning):
        return AddedConditioning(*map(in_float64, value))
    return value.double() if value.is_floating_point() else value


def run_oracle(oracle: UNet2DConditionModel, inputs: dict[str, Any]) -> torch.Tensor:
    added, guidance_scale = inputs.get("added"), inputs.get("guidance_scale")
    return oracle(
        inputs["sample"],
        inputs["timestep"],
        encoder_hidden_states=inputs["context"],
        class_labels=inputs.get("class_labels"),
        timestep_cond=None if guidance_scale is None else embed_guidance_scale(oracle, guidance_scale),
        added_cond_kwargs=added._asdict() if added is not None else None,
    ).sample


def embed_guidance_scale(oracle: UNet2DConditionModel, guidance_scale: torch.Tensor) -> torch.Tensor:
    """As diffusers' pipelines do; the method uses nothing of the pipeline."""
    return StableDiffusionPipeline.get_guidance_scale_embedding(
        None,  # type: ignore[arg-type]
        guidance_scale - 1,
        embedding_dim=oracle.config["time_cond_proj_dim"],
    )


@torch.no_grad()
def test_agrees_with_diffusers(family_fields):
    unet, oracle = build_pair(family_fields)
    for size in ((8, 8), (7, 5), (16, 4)):
        inputs = build_inputs(unet.config, size=size)
        assert relative_error(unet(**inputs), run_oracle(oracle, inputs)) < 1e-5


@torch.no_grad()
def test_channels_last_and_every_backend_give_the_same(sd1_fields):
    unet, _ = build_pair(sd1_fields)
    inputs = build_inputs(unet.config)
    expected = unet(**inputs)
    unet.to(memory_format=torch.channels_last)
    inputs["sample"] = inputs["sample"].to(memory_format=torch.channels_last)
    assert relative_error(unet(**inputs), expected) < 1e-5
    unet.attention_backend = "chunked"
    assert unet.attention_backend == "chunked"
    assert all(module.backend == "chunked" for module in unet.modules() if isinstance(module, Attention))
    assert relative_error(unet(**inputs), expected) < 1e-5


@torch.no_grad()
def test_steps_of_a_run_equal_forward(family_fields):
    """In float64, so that no rounding of a processor's kernels hides or feigns a difference."""
    unet, _ = build_pair(family_fields)
    unet.double()
    inputs = {name: in_float64(value) for name, value in build_inputs(unet.config).items()}
    sample, timesteps = inputs.pop("sample"), torch.tensor([999.0, 500.5, 1.0])
    inputs.pop("timestep")
    constants = unet.constants(timesteps=timesteps, **inputs)
    for index, timestep in enumerate(timesteps.tolist()):
        expected = unet(sample, timestep, **inputs)
        assert relative_error(unet.step(sample, constants, index), expected) < 1e-9


@torch.no_grad()
def test_rows_that_differ_in_context_share_their_beginning(family_fields):
    unet, _ = build_pair(family_fields)
    inputs = build_inputs(unet.config, batch=4)
    sample, timestep = inputs.pop("sample")[:2], torch.tensor([500])
    inputs.pop("timestep")
    constants = unet.constants(timesteps=timestep, **inputs)
    expected = unet(sample.repeat(2, 1, 1, 1), timestep, **inputs)
    assert relative_error(unet.step(sample, constants, 0), expected) < 1e-6


def test_guidance_rows_run_once_before_the_first_transformer(sdxl_fields):
    sd1_like = sdxl_fields | {"addition_embed_type": None}
    unet, _ = build_pair(sd1_like)
    rows = []
    for resnet in (unet.down_blocks[0].resnets[0], unet.up_blocks[-1].resnets[-1]):
        resnet.register_forward_pre_hook(lambda module, arguments: rows.append(arguments[0].shape[0]))
    inputs = build_inputs(unet.config)
    constants = unet.constants(inputs["context"], torch.tensor([500]))
    assert unet.step(inputs["sample"][:1], constants, 0).shape[0] == 2
    assert rows == [1, 2]


@pytest.mark.parametrize("timestep", [500, 500.0, torch.tensor(500), torch.tensor([500])])
@torch.no_grad()
def test_one_timestep_serves_all_samples(sd1_fields, timestep):
    unet, oracle = build_pair(sd1_fields)
    inputs = build_inputs(unet.config) | {"timestep": timestep}
    assert relative_error(unet(**inputs), run_oracle(oracle, inputs)) < 1e-5


@torch.no_grad()
def test_one_guidance_scale_serves_all_samples(sd1_fields):
    unet, oracle = build_pair(sd1_fields | {"time_cond_proj_dim": 256})
    inputs = build_inputs(unet.config) | {"guidance_scale": 8.5}
    expected = run_oracle(oracle, inputs | {"guidance_scale": torch.tensor([8.5, 8.5])})
    assert relative_error(unet(**inputs), expected) < 1e-5
    assert relative_error(unet(**inputs | {"guidance_scale": 2.0}), expected) > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision(sdxl_fields, dtype):
    unet, _ = build_pair(sdxl_fields)
    inputs = build_inputs(unet.config)
    expected = unet(**inputs)
    unet.to(dtype)
    inputs |= {"sample": inputs["sample"].to(dtype), "context": inputs["context"].to(dtype)}
    actual = unet(**inputs)
    assert actual.dtype == dtype
    assert relative_error(actual.float(), expected) < (0.03 if dtype == torch.bfloat16 else 0.005)


def test_gradients_equal_diffusers_with_and_without_checkpointing(sd1_fields):
    unet, oracle = build_pair(sd1_fields)
    inputs = build_inputs(unet.config)
    run_oracle(oracle, inputs).square().mean().backward()
    expected = {name: parameter.grad for name, parameter in oracle.named_parameters()}
    for checkpointing in (False, "selective", True):
        unet.zero_grad()
        unet.gradient_checkpointing = checkpointing
        unet(**inputs).square().mean().backward()
        for name, parameter in unet.named_parameters():
            assert torch.allclose(parameter.grad, expected[name], rtol=1e-3, atol=1e-6), name


@pytest.mark.parametrize(
    ("fields", "given", "named"),
    [
        ({}, {"class_labels": torch.tensor([0, 1])}, "class_labels"),
        ({"num_class_embeds": 3}, {}, "class_labels"),
        ({}, {"added": AddedConditioning(torch.zeros(2, POOLED), torch.zeros(2, 6))}, "added"),
        (ADDED, {}, "added"),
        (ADDED, {"added": AddedConditioning(torch.zeros(2, POOLED), torch.zeros(2, 5))}, "60 .*68"),
        ({}, {"guidance_scale": 7.5}, "guidance_scale"),
        ({"time_cond_proj_dim": 12}, {}, "guidance_scale"),
    ],
    ids=str,
)
def test_conditioning_that_does_not_fit_is_refused(sd1_fields, fields, given, named):
    inputs = build_inputs(UNetConfig.from_json(sd1_fields))
    with pytest.raises(InputError, match=named):
        UNet(UNetConfig.from_json(sd1_fields | fields))(**inputs, **given)
