"""Optimisers of one parameter each do what those of all parameters do, with fewer gradients at once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from latentgen.errors import OutputError
from latentgen.train.checkpoint import flatten_optimizer, restore_optimizer
from latentgen.train.config import Optimizer
from latentgen.train.offload import FileStore, HostStore
from latentgen.train.one_by_one import OffloadedGradients
from tests.train.optimized import Network, backward, build, run_backward


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
    for key, p in network.named_parameters():
        assert torch.equal(p, other.get_parameter(key)), key


def held_gradients(network: Network, offload: Path | None = None, **fields: object) -> int:
    """The most bytes of gradients at once during a backward pass."""
    held: list[int] = []

    def look(_: Tensor) -> None:
        held.append(sum(0 if p.grad is None else p.grad.nbytes for p in network.parameters()))

    # Before the optimiser's own hooks, which drop the gradient.
    for p in network.parameters():
        p.register_post_accumulate_grad_hook(look)
    run_backward(network, build(network, "adafactor", offload=offload, **fields), range(2))
    return max(held)


def test_gradients_are_taken_one_by_one(network: Network, tmp_path: Path):
    sizes = [p.nbytes for p in network.parameters()]
    assert held_gradients(copy.deepcopy(network)) == sum(sizes)
    assert held_gradients(copy.deepcopy(network), tmp_path) == max(sizes)
    assert held_gradients(network, step_in_backward=True, max_grad_norm=None) == max(sizes)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_state_round_trip_of_steps_in_the_backward_pass(
    name: str, memory_format: torch.memory_format, network: Network
):
    fields = {"step_in_backward": True, "max_grad_norm": None}
    network.to(memory_format=memory_format)
    # Its hooks stay with the parameters, so it is copied first.
    resumed = copy.deepcopy(network)
    optimizer = build(network, name, **fields)
    run_backward(network, optimizer, range(3))
    resumed.load_state_dict(network.state_dict())
    other = build(resumed, name, **fields)
    state = flatten_optimizer(optimizer)
    restore_optimizer(
        other, {key: value.clone(memory_format=torch.contiguous_format) for key, value in state.items()}
    )
    again = flatten_optimizer(other)
    assert again.keys() == state.keys()
    run_backward(network, optimizer, range(3, 6))
    run_backward(resumed, other, range(3, 6))
    for key, parameter in network.named_parameters():
        assert torch.equal(parameter, resumed.get_parameter(key)), key


def test_the_learning_rate_reaches_steps_in_the_backward_pass(network: Network):
    optimizer = build(network, "adafactor", step_in_backward=True, max_grad_norm=None)
    before = copy.deepcopy(network.state_dict())
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    run_backward(network, optimizer, range(1))
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


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
@pytest.mark.parametrize("in_file", [True, False])
def test_gradients_that_were_away_are_those_that_stayed(
    max_norm: float | None,
    parts: int,
    memory_format: torch.memory_format,
    name: str,
    in_file: bool,
    network: Network,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    if not in_file:
        monkeypatch.setattr(
            "latentgen.train.optimizer.store_for", lambda parameters, _: HostStore(parameters)
        )
    network.to(memory_format=memory_format)
    other = copy.deepcopy(network)
    optimizer = build(other, name, offload=tmp_path)
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
    for key, p in network.named_parameters():
        assert torch.equal(p, other.get_parameter(key)), key
        assert other.get_parameter(key).grad is None


AWAY: list[dict[str, object]] = [{}, {"step_in_backward": True, "max_grad_norm": None}]


@pytest.mark.parametrize("fields", AWAY)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_a_state_that_is_away_is_that_which_stays(
    name: str, memory_format: torch.memory_format, fields: dict[str, object], network: Network, tmp_path: Path
):
    network.to(memory_format=memory_format)
    other, resumed = copy.deepcopy(network), copy.deepcopy(network)
    optimizer, stays = build(other, name, offload=tmp_path, **fields), build(network, name, **fields)
    assert not flatten_optimizer(optimizer)
    run_backward(other, optimizer, range(3))
    run_backward(network, stays, range(3))
    state, expected = flatten_optimizer(optimizer), flatten_optimizer(stays)
    assert list(state) == list(expected)
    assert all(torch.equal(value, expected[key]) for key, value in state.items())
    # And goes on, from what a run wrote that kept it on the device.
    resumed.load_state_dict(network.state_dict())
    again = build(resumed, name, offload=tmp_path, **fields)
    restore_optimizer(
        again, {key: value.clone(memory_format=torch.contiguous_format) for key, value in expected.items()}
    )
    run_backward(other, optimizer, range(3, 5))
    run_backward(network, stays, range(3, 5))
    run_backward(resumed, again, range(3, 5))
    for key, p in network.named_parameters():
        assert torch.equal(p, other.get_parameter(key)), key
        assert torch.equal(p, resumed.get_parameter(key)), key


def test_no_moments_are_in_memory_between_the_steps(network: Network, tmp_path: Path):
    optimizer = build(network, "adamw", offload=tmp_path)
    assert isinstance(optimizer, OffloadedGradients)
    run_backward(network, optimizer, range(2))
    held = [set(values) for part in optimizer._parts for values in part.state.values()]
    assert held == [{"step"}] * len(list(network.parameters()))


def test_what_has_no_gradient_stays_as_it_is(network: Network, tmp_path: Path):
    optimizer = build(network, "adamw", offload=tmp_path)
    run_backward(network, optimizer, range(1))
    before = copy.deepcopy(network.state_dict())
    network.narrow(torch.randn(2, 16, 3, 3)).mean().backward()
    optimizer.step()
    changed = {key for key, value in network.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"narrow.weight", "narrow.bias"}


def test_what_was_forgotten_is_not_applied(network: Network, tmp_path: Path):
    other = copy.deepcopy(network)
    optimizer, stays = build(other, "adamw", offload=tmp_path), build(network, "adamw")
    backward(other, 0)
    assert isinstance(optimizer, OffloadedGradients)
    optimizer.clip_grad_norm(0.01)
    optimizer.zero_grad()
    run_backward(other, optimizer, range(1, 2))
    run_backward(network, stays, range(1, 2))
    for key, p in network.named_parameters():
        assert torch.equal(p, other.get_parameter(key)), key


def test_a_full_disk_is_told_out_of_the_backward_pass(
    network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(*_: object) -> None:
        raise OutputError("no room")

    build(network, "adamw", offload=tmp_path)
    monkeypatch.setattr(FileStore, "send", full)
    with pytest.raises(OutputError, match="no room"):
        backward(network, 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_the_host_of_an_accelerator_keeps_what_it_is_given(name: str, network: Network, tmp_path: Path):
    network.to("cuda")
    other, resumed = copy.deepcopy(network), copy.deepcopy(network)
    optimizer, stays = build(other, name, offload=tmp_path), build(network, name)
    assert isinstance(optimizer, OffloadedGradients)
    oracle = partial(clip_grad_norm_, list(network.parameters()), 5.0)
    expected = clipped_and_accumulated(network, stays, oracle, parts=2)
    assert (
        clipped_and_accumulated(other, optimizer, partial(optimizer.clip_grad_norm, 5.0), parts=2) == expected
    )
    state, there = flatten_optimizer(optimizer), flatten_optimizer(stays)
    assert all(torch.equal(value.cpu(), there[key].cpu()) for key, value in state.items())
    resumed.load_state_dict(network.state_dict())
    again = build(resumed, name, offload=tmp_path)
    restore_optimizer(again, {key: value.cpu().contiguous() for key, value in there.items()})
    run_backward(other, optimizer, range(3))
    run_backward(resumed, again, range(3))
    for key, p in other.named_parameters():
        assert torch.equal(p, resumed.get_parameter(key)), key


def test_no_gradients_have_no_norm(network: Network, tmp_path: Path):
    optimizer = build(network, "adamw", offload=tmp_path)
    assert isinstance(optimizer, OffloadedGradients)
    assert optimizer.clip_grad_norm(1.0) == 0


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        (
            {"name": "muon", "step_in_backward": True, "max_grad_norm": None},
            "for adamw and adafactor; name is muon",
        ),
        ({"name": "adafactor", "step_in_backward": True}, "max_grad_norm is 1 and must be null"),
    ],
)
def test_what_cannot_step_in_the_backward_pass(fields: dict[str, object], problem: str):
    with pytest.raises(ValidationError, match=problem):
        Optimizer.model_validate(fields)
