"""Optimizers of one parameter each give the results of one over all, with fewer gradients at once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from latentgen.train.checkpoint import flatten_optimizer, restore_optimizer
from latentgen.train.optimizer.offloaded import OffloadedAdamW, OffloadedGradients
from tests.train.optimized import (
    Network,
    assert_same_weights,
    backward,
    build,
    changed_weights,
    run_backward,
    saved_state,
)


@pytest.fixture
def network() -> Network:
    torch.manual_seed(0)
    return Network()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_stepping_in_the_backward_pass_changes_when_and_not_how(
    name: str, memory_format: torch.memory_format, network: Network
):
    network.to(memory_format=memory_format)
    other = copy.deepcopy(network)
    run_backward(network, build(network, name), range(3))
    run_backward(other, build(other, name, step_in_backward=True, max_grad_norm=None), range(3))
    assert_same_weights(other, network)


def held_gradients(network: Network, offload: bool = False, **fields: object) -> int:
    """The most bytes of gradients at once during a backward pass."""
    held: list[int] = []

    def look(_: Tensor) -> None:
        held.append(sum(0 if p.grad is None else p.grad.nbytes for p in network.parameters()))

    # Before the optimizer's own hooks, which drop the gradient.
    for p in network.parameters():
        p.register_post_accumulate_grad_hook(look)
    run_backward(network, build(network, "adafactor", offload=offload, **fields), range(2))
    return max(held)


def test_gradients_are_taken_one_by_one(network: Network):
    sizes = [p.nbytes for p in network.parameters()]
    assert held_gradients(copy.deepcopy(network)) == sum(sizes)
    assert held_gradients(copy.deepcopy(network), offload=True) == max(sizes)
    assert held_gradients(network, step_in_backward=True, max_grad_norm=None) == max(sizes)


def clipped_and_accumulated(
    network: Network, optimizer: torch.optim.Optimizer, clip: Callable[[], Tensor] | None, *, parts: int
) -> list[Tensor]:
    """Train for three steps; returns the norms of the gradients."""
    norms: list[Tensor] = []
    for step in range(3):
        for part in range(parts):
            backward(network, step * parts + part)
        if clip is not None:
            norms.append(clip())
        optimizer.step()
        optimizer.zero_grad()
    return norms


# Higher than the norms of all steps, between them, and lower.
@pytest.mark.parametrize("max_norm", [None, 100.0, 5.0, 0.01])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_offloaded_gradients_train_to_the_same_bits(
    max_norm: float | None, parts: int, memory_format: torch.memory_format, name: str, network: Network
):
    network.to(memory_format=memory_format)
    other = copy.deepcopy(network)
    optimizer = build(other, name, offload=True)
    assert isinstance(optimizer, OffloadedGradients)
    oracle = None if max_norm is None else partial(clip_grad_norm_, list(network.parameters()), max_norm)
    ours = None if max_norm is None else partial(optimizer.clip_grad_norm, max_norm)
    expected = clipped_and_accumulated(network, build(network, name), oracle, parts=parts)
    norms = clipped_and_accumulated(other, optimizer, ours, parts=parts)
    assert norms == expected
    if max_norm is not None and parts == 1:
        assert {bool(norm > max_norm) for norm in norms} == {
            100.0: {False},
            5.0: {False, True},
            0.01: {True},
        }[max_norm]
    assert_same_weights(other, network)
    assert all(p.grad is None for p in other.parameters())


AWAY: list[dict[str, object]] = [{}, {"step_in_backward": True, "max_grad_norm": None}]


@pytest.mark.parametrize("fields", AWAY)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_an_offloaded_state_is_the_same_and_resumes(
    name: str, memory_format: torch.memory_format, fields: dict[str, object], network: Network
):
    network.to(memory_format=memory_format)
    other, resumed = copy.deepcopy(network), copy.deepcopy(network)
    optimizer, stays = build(other, name, offload=True, **fields), build(network, name, **fields)
    assert not flatten_optimizer(optimizer)
    run_backward(other, optimizer, range(3))
    run_backward(network, stays, range(3))
    state, expected = flatten_optimizer(optimizer), flatten_optimizer(stays)
    assert list(state) == list(expected)
    assert all(torch.equal(value, expected[key]) for key, value in state.items())
    # And it resumes from the state of an optimizer that is not offloaded.
    resumed.load_state_dict(network.state_dict())
    again = build(resumed, name, offload=True, **fields)
    restore_optimizer(again, saved_state(stays))
    run_backward(other, optimizer, range(3, 5))
    run_backward(network, stays, range(3, 5))
    run_backward(resumed, again, range(3, 5))
    assert_same_weights(other, network)
    assert_same_weights(resumed, network)


def test_moments_are_in_host_memory_between_the_steps(network: Network):
    optimizer = build(network, "adamw", offload=True)
    assert isinstance(optimizer, OffloadedGradients)
    run_backward(network, optimizer, range(2))
    assert len(optimizer._parts) == len(list(network.parameters()))
    for part in optimizer._parts:
        assert isinstance(part, OffloadedAdamW)
        (state,) = part.state.values()
        assert {name: state[name].data_ptr() for name in ("exp_avg", "exp_avg_sq")} == {
            name: host._buffer.data_ptr() for name, host in part._host.items()
        }


def test_parameters_without_gradient_stay(network: Network):
    optimizer = build(network, "adamw", offload=True)
    run_backward(network, optimizer, range(1))
    before = copy.deepcopy(network.state_dict())
    network.narrow(torch.randn(2, 16, 3, 3)).mean().backward()
    optimizer.step()
    assert changed_weights(network, before) == {"narrow.weight", "narrow.bias"}


def test_zero_grad_drops_offloaded_gradients(network: Network):
    other = copy.deepcopy(network)
    optimizer, stays = build(other, "adamw", offload=True), build(network, "adamw")
    backward(other, 0)
    assert isinstance(optimizer, OffloadedGradients)
    optimizer.clip_grad_norm(0.01)
    optimizer.zero_grad()
    run_backward(other, optimizer, range(1, 2))
    run_backward(network, stays, range(1, 2))
    assert_same_weights(other, network)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_offloading_from_cuda(name: str, network: Network):
    network.to("cuda")
    other, resumed = copy.deepcopy(network), copy.deepcopy(network)
    optimizer, stays = build(other, name, offload=True), build(network, name)
    assert isinstance(optimizer, OffloadedGradients)
    oracle = partial(clip_grad_norm_, list(network.parameters()), 5.0)
    expected = clipped_and_accumulated(network, stays, oracle, parts=2)
    assert (
        clipped_and_accumulated(other, optimizer, partial(optimizer.clip_grad_norm, 5.0), parts=2) == expected
    )
    state, there = flatten_optimizer(optimizer), flatten_optimizer(stays)
    assert all(torch.equal(value.cpu(), there[key].cpu()) for key, value in state.items())
    resumed.load_state_dict(network.state_dict())
    again = build(resumed, name, offload=True)
    restore_optimizer(again, saved_state(stays))
    run_backward(other, optimizer, range(3))
    run_backward(resumed, again, range(3))
    assert_same_weights(resumed, other)


def test_no_gradients_have_no_norm(network: Network):
    optimizer = build(network, "adamw", offload=True)
    assert isinstance(optimizer, OffloadedGradients)
    assert optimizer.clip_grad_norm(1.0) == 0
