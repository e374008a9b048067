"""The optimizers against those of torch and bitsandbytes, in every memory format."""

from __future__ import annotations

import copy
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from latentgen.train.checkpoint import flatten_optimizer, restore_optimizer
from tests.train.optimized import (
    BETAS,
    DECAY,
    RATE,
    Network,
    assert_same_weights,
    build,
    changed_weights,
    gradients,
    run_backward,
    saved_state,
)

needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is optional")


@pytest.fixture
def network() -> Network:
    torch.manual_seed(0)
    return Network()


def make(network: nn.Module) -> torch.optim.Optimizer:
    return build(network, "muon")


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


def test_every_group_has_its_learning_rate(network: Network):
    optimizer = make(network)
    before = copy.deepcopy(network.state_dict())
    matrices, rest = optimizer.param_groups
    rest["lr"] = 0.0
    train(network, optimizer, range(1))
    assert changed_weights(network, before) == {"conv.weight", "point.weight", "linear.weight"}
    assert len(matrices["params"]) == 3


def test_frozen_and_unused_parameters_stay(network: Network):
    network.linear.requires_grad_(False)
    before = copy.deepcopy(network.state_dict())
    optimizer = make(network)
    network.conv.weight.grad = torch.ones_like(network.conv.weight)
    optimizer.step()
    assert changed_weights(network, before) == {"conv.weight"}


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


def test_adafactor_is_torchs_on_the_reshaped_kernels(network: Network):
    copies = {
        name: nn.Parameter(p.detach().clone().flatten(1) if p.ndim == 4 else p.detach().clone())
        for name, p in network.named_parameters()
    }
    oracle = torch.optim.Adafactor(copies.values(), lr=RATE, weight_decay=DECAY)
    optimizer = build(network, "adafactor")
    for step in range(3):
        for name, grad in gradients(network, step).items():
            copies[name].grad = grad.flatten(1) if grad.ndim == 4 else grad
        oracle.step()
        train(network, optimizer, range(step, step + 1))
    for name, p in network.named_parameters():
        assert torch.equal(p.flatten(1) if p.ndim == 4 else p, copies[name]), name


IN_BACKWARD = {"step_in_backward": True, "max_grad_norm": None}
KINDS = [
    ("adamw", {}),
    ("adafactor", {}),
    ("muon", {}),
    ("adamw", IN_BACKWARD),
    ("adafactor", IN_BACKWARD),
    pytest.param("adamw8bit", {}, marks=needs_bitsandbytes),
]


def is_text(name: str) -> bool:
    return name.startswith(("point", "linear"))


@pytest.mark.parametrize(("name", "fields"), KINDS)
def test_a_text_encoder_of_rate_zero_stays_and_the_rest_learns_as_usual(
    name: str, fields: dict[str, object], network: Network
):
    start, other = copy.deepcopy(network.state_dict()), copy.deepcopy(network)
    run = run_backward if fields else train  # in one backward pass the gradients are the same, too
    run(network, build(network, name, text_encoder_learning_rate=0, **fields), range(1 if fields else 3))
    run(other, build(other, name, **fields), range(1 if fields else 3))
    for key, p in network.named_parameters():
        assert torch.equal(p, start[key] if is_text(key) else other.get_parameter(key)), key
        assert not torch.equal(other.get_parameter(key), start[key]), key


@pytest.mark.parametrize(("name", "fields"), KINDS)
def test_a_state_does_not_depend_on_the_rates(name: str, fields: dict[str, object], network: Network):
    """So runs that began with one rate, as all once did, can continue with two."""
    resumed = copy.deepcopy(network)
    run = run_backward if fields else train
    optimizer = build(network, name, **fields)
    run(network, optimizer, range(2))
    state = saved_state(optimizer)
    resumed.load_state_dict(network.state_dict())
    other = build(resumed, name, text_encoder_learning_rate=RATE / 2, **fields)
    restore_optimizer(other, state)
    again = flatten_optimizer(other)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], value) for key, value in state.items())
    for group in other.param_groups:
        group["lr"] = RATE
    run(network, optimizer, range(2, 4))
    run(resumed, other, range(2, 4))
    assert_same_weights(resumed, network)


@needs_bitsandbytes
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_eight_bits_follow_adamw_and_resume(memory_format: torch.memory_format):
    torch.manual_seed(0)
    network = Network()
    network.conv = nn.Conv2d(12, 64, 3)  # bitsandbytes keeps the state of fewer than 4096 elements in float32
    network.point = nn.Conv2d(64, 10, 1)
    network.to(memory_format=memory_format)
    exact, resumed = copy.deepcopy(network), copy.deepcopy(network)
    optimizer, oracle = build(network, "adamw8bit"), build(exact, "adamw")
    start = network.conv.weight.detach().clone()
    train(network, optimizer, range(3))
    train(exact, oracle, range(3))
    assert (network.conv.weight - exact.conv.weight).norm() < 0.1 * (exact.conv.weight - start).norm()
    torch.testing.assert_close(network.conv.bias, exact.conv.bias)
    state = saved_state(optimizer)
    assert {value.dtype for key, value in state.items() if key.startswith("0.state")} == {torch.uint8}
    resumed.load_state_dict(network.state_dict())
    other = build(resumed, "adamw8bit")
    restore_optimizer(other, state)
    train(network, optimizer, range(3, 6))
    train(resumed, other, range(3, 6))
    assert_same_weights(resumed, network)
