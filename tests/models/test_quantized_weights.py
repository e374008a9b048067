"""Weights in fewer bits: how far off they are, and that what is computed with them is what torch computes."""

from __future__ import annotations

import copy
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from latentgen.models.config import StorageDtype
from latentgen.models.quantized_weights import FrozenConv2d, FrozenLinear, QuantizedWeight, quantize_frozen
from latentgen.models.unet import UNet
from latentgen.models.unet_config import UNetConfig

STORAGES: tuple[StorageDtype, ...] = tuple(storage for storage in get_args(StorageDtype) if storage != "fp32")
BYTES = {"bf16": 2, "fp16": 2, "fp8": 1, "int8": 1}


def weight_of(*shape: int) -> Tensor:
    """Small values, as in trained networks, of a different size in each output channel."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.logspace(-3, 0, shape[0]).view(-1, *[1] * (len(shape) - 1))
    return 0.05 * sizes * torch.randn(shape, generator=generator)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.point = nn.Conv2d(8, 8, 1, bias=False)
        self.norm = nn.GroupNorm(2, 8)
        self.linear = nn.Linear(8, 5)
        self.table = nn.Embedding(4, 8)

    def forward(self, image: Tensor) -> Tensor:
        hidden = self.norm(self.point(self.conv(image)))
        return self.linear(hidden.mean(dim=(2, 3)) + self.table.weight[0])


@pytest.fixture
def network() -> Network:
    torch.manual_seed(0)
    return Network().requires_grad_(False)


@pytest.mark.parametrize("shape", [(16, 40), (16, 6, 3, 3)])
@pytest.mark.parametrize("storage", STORAGES)
def test_the_error_is_within_its_bound(storage: StorageDtype, shape: tuple[int, ...]):
    weight = weight_of(*shape)
    weight[3] = 0
    stored = QuantizedWeight(weight, storage)
    error = (stored.dense(torch.float32) - weight).abs()
    largest = weight.abs().amax(dim=tuple(range(1, weight.ndim)), keepdim=True)
    bound = {
        "bf16": 2.0**-8 * weight.abs(),
        # The step of subnormal numbers is 2**-24.
        "fp16": (2.0**-11 * weight.abs()).clamp(min=2.0**-25),
        "fp8": torch.maximum(2.0**-4 * weight.abs(), 2.0**-18 * largest),
        "int8": largest / 254,
    }[storage]
    assert (error <= bound * (1 + 1e-5)).all()
    assert error.max() > 0
    assert stored.bits.nbytes == BYTES[storage] * weight.numel()
    assert stored.dense(torch.bfloat16).dtype == torch.bfloat16


def test_small_channels_are_no_worse_than_large_ones():
    weight = weight_of(16, 4096)
    for storage, most in (("fp8", 0.03), ("int8", 0.012)):
        error = QuantizedWeight(weight, storage).dense(torch.float32) - weight
        assert (error.norm(dim=1) <= most * weight.norm(dim=1)).all()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("storage", STORAGES)
def test_outputs_and_gradients_are_those_of_torch_with_the_same_weights(
    storage: StorageDtype, autocast: bool, network: Network
):
    quantize_frozen(network, storage)
    assert isinstance(network.conv, FrozenConv2d)
    assert isinstance(network.linear, FrozenLinear)
    oracle = Network().requires_grad_(False)
    oracle.load_state_dict(network.state_dict(), strict=False)
    for name in ("conv", "point", "linear"):
        oracle.get_parameter(f"{name}.weight").copy_(network.get_submodule(name).weight)
    results = []
    for model in (network, oracle):
        image = torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = model(image)
        output.float().square().sum().backward()
        results.append((output, image.grad))
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        tolerance = 2e-2 if autocast else 1e-5
        assert (ours - theirs).norm() <= tolerance * theirs.norm()


def test_trained_layers_norms_and_embeddings_stay(network: Network):
    network.linear.requires_grad_(True)
    before = dict(network.named_parameters())
    quantize_frozen(network, "int8")
    assert type(network.linear) is nn.Linear
    for name in ("linear.weight", "linear.bias", "norm.weight", "table.weight", "conv.bias"):
        assert network.get_parameter(name) is before[name]
    assert {type(network.conv), type(network.point)} == {FrozenConv2d}


def test_float32_changes_nothing(network: Network):
    quantize_frozen(network, "fp32")
    assert type(network.conv) is nn.Conv2d


def test_bytes_survive_a_change_of_the_modules_dtype_and_format(network: Network):
    quantize_frozen(network, "fp8")
    before = network.conv.weight
    network.to(torch.bfloat16).to(memory_format=torch.channels_last)
    assert network.conv.stored.bits.dtype == torch.uint8
    assert network.conv.stored.bits.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(network.conv.weight, before, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("storage", STORAGES)
def test_nothing_is_saved_for_the_backward_pass(storage: StorageDtype, network: Network):
    saved: list[Tensor] = []
    quantize_frozen(network, storage)
    hidden = torch.randn(2, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        network.linear(hidden)
    assert saved == []


@pytest.mark.parametrize("storage", STORAGES)
def test_adapters_of_peft_learn_over_stored_weights(storage: StorageDtype):
    from peft import LoraConfig, inject_adapter_in_model

    fields = {
        "sample_size": 8,
        "block_out_channels": [16, 32],
        "layers_per_block": 1,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
        "norm_num_groups": 8,
    }
    torch.manual_seed(0)
    plain = UNet(UNetConfig.from_json(fields)).requires_grad_(False)
    stored = copy.deepcopy(plain)
    gradients = []
    for unet in (plain, stored):
        torch.manual_seed(1)
        config = LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "conv1"], init_lora_weights=False)
        inject_adapter_in_model(config, unet)
        if unet is stored:
            quantize_frozen(unet, storage)
        unet.gradient_checkpointing = True
        torch.manual_seed(2)
        output = unet(torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 7, 16))
        output.square().mean().backward()
        trained = {name: p for name, p in unet.named_parameters() if p.requires_grad}
        assert trained
        assert all("lora_" in name and p.dtype == torch.float32 for name, p in trained.items())
        gradients.append(torch.cat([p.grad.flatten() for p in trained.values() if p.grad is not None]))
    error = (gradients[1] - gradients[0]).norm() / gradients[0].norm()
    assert 0 < error < {"bf16": 0.02, "fp16": 0.004, "fp8": 0.15, "int8": 0.05}[storage]
