"""MuonAdamW against torch's Muon and AdamW, in every memory format."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from latentgen.train.checkpoint import flatten_optimizer, restore_optimizer
from latentgen.train.config import Optimizer
from latentgen.train.optimizer import MuonAdamW, build_optimizer

RATE, DECAY, BETAS = 0.01, 0.1, (0.9, 0.99)


class Network(nn.Module):
    """One of each: kernels 3x3 and 1x1, a matrix, a table, a matrix too narrow for Muon, and biases."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(12, 16, 3)
        self.point = nn.Conv2d(16, 10, 1)
        self.linear = nn.Linear(10, 24)
        self.table = nn.Embedding(20, 10)
        self.narrow = nn.Conv2d(16, 3, 3)


@pytest.fixture
def network() -> Network:
    torch.manual_seed(0)
    return Network()


def make(network: nn.Module) -> MuonAdamW:
    return MuonAdamW(network, learning_rate=RATE, betas=BETAS, weight_decay=DECAY)


def gradients(network: nn.Module, step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(p.shape, generator=generator) for name, p in network.named_parameters()}


def train(
    network: nn.Module, optimizer: torch.optim.Optimizer, steps: range, *, contiguous: bool = False
) -> None:
    for step in steps:
        for name, grad in gradients(network, step).items():
            parameter = network.get_parameter(name)
            parameter.grad = grad if contiguous else torch.empty_like(parameter).copy_(grad)
        optimizer.step()


def test_kernels_follow_torchs_muon_on_the_reshaped_matrix(network: Network):
    names = ("conv.weight", "point.weight", "linear.weight")
    matrices = [nn.Parameter(network.get_parameter(name).detach().clone().flatten(1)) for name in names]
    oracle = torch.optim.Muon(matrices, lr=RATE, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw")
    optimizer = make(network)
    for step in range(3):
        grads = gradients(network, step)
        for matrix, name in zip(matrices, names, strict=True):
            matrix.grad = grads[name].flatten(1)
        oracle.step()
        train(network, optimizer, range(step, step + 1))
    for matrix, name in zip(matrices, names, strict=True):
        assert torch.equal(network.get_parameter(name).flatten(1), matrix), name


def test_everything_else_follows_torchs_adamw(network: Network):
    names = ("table.weight", "narrow.weight", "conv.bias", "linear.bias", "narrow.bias")
    copies = [nn.Parameter(network.get_parameter(name).detach().clone()) for name in names]
    oracle = torch.optim.AdamW(copies, lr=RATE, betas=BETAS, weight_decay=DECAY, fused=True)
    optimizer = make(network)
    for step in range(3):
        grads = gradients(network, step)
        for parameter, name in zip(copies, names, strict=True):
            parameter.grad = grads[name]
        oracle.step()
        train(network, optimizer, range(step, step + 1))
    for parameter, name in zip(copies, names, strict=True):
        assert torch.equal(network.get_parameter(name), parameter), name


def test_channels_last_kernels_take_the_same_update(network: Network):
    start = network.conv.weight.detach().clone()
    other = copy.deepcopy(network).to(memory_format=torch.channels_last)
    train(network, make(network), range(3))
    train(other, make(other), range(3))
    assert other.conv.weight.is_contiguous(memory_format=torch.channels_last)
    ours, theirs = other.conv.weight - start, network.conv.weight - start
    # Muon rounds to bfloat16, in another order of columns.
    assert (ours - theirs).norm() < 0.02 * theirs.norm()


def test_the_layout_of_a_gradient_does_not_matter(network: Network):
    network.to(memory_format=torch.channels_last)
    other = copy.deepcopy(network)
    train(network, make(network), range(3))
    train(other, make(other), range(3), contiguous=True)
    assert torch.equal(network.conv.weight, other.conv.weight)


def test_a_layout_that_is_no_matrix_is_an_error(network: Network):
    network.conv.weight.data = network.conv.weight.data.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    with pytest.raises(RuntimeError, match="view"):
        make(network)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_state_round_trip(name: str, memory_format: torch.memory_format, network: Network):
    config = Optimizer.model_validate({"name": name, "learning_rate": RATE})
    network.to(memory_format=memory_format)
    optimizer = build_optimizer(network, config)
    train(network, optimizer, range(3))
    # Through a file, tensors come back contiguous.
    state = {
        key: value.clone(memory_format=torch.contiguous_format)
        for key, value in flatten_optimizer(optimizer).items()
    }
    resumed = copy.deepcopy(network)
    other = build_optimizer(resumed, config)
    restore_optimizer(other, state)
    assert {key: value.tolist() for key, value in flatten_optimizer(other).items()} == {
        key: value.tolist() for key, value in state.items()
    }
    train(network, optimizer, range(3, 6))
    train(resumed, other, range(3, 6))
    for key, parameter in network.named_parameters():
        assert torch.equal(parameter, resumed.get_parameter(key)), key


def test_the_learning_rate_is_that_of_the_first_group(network: Network):
    optimizer = make(network)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    optimizer.param_groups[0]["lr"] = 0.0
    train(network, optimizer, range(1))
    assert all(torch.equal(p, before[name]) for name, p in network.named_parameters())


def test_frozen_and_unused_parameters_stay(network: Network):
    network.linear.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    optimizer = make(network)
    network.conv.weight.grad = torch.ones_like(network.conv.weight)
    optimizer.step()
    changed = {name for name, p in network.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"conv.weight"}


def test_closure_is_called_once_and_its_loss_returned(network: Network):
    calls: list[bool] = []

    def closure() -> float:
        calls.append(torch.is_grad_enabled())
        return 2.5

    with torch.no_grad():
        assert make(network).step(closure) == 2.5
    assert calls == [True]


def test_a_network_without_matrices():
    network = nn.Conv2d(3, 4, 3)
    before = network.weight.detach().clone()
    train(network, make(network), range(1))
    assert not torch.equal(network.weight, before)
