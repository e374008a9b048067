"""Signals between two steps, and which runs can have sharded weights; test_processes.py runs several processes."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from torch import nn

from latentgen.errors import ConfigError
from latentgen.train.distributed import (
    ShardedModule,
    build_accelerator,
    catch_stop_signal,
    check_sharding,
    full_tensor,
    full_tensors,
    shard_like,
    wrap_for_sharding,
)
from tests.train.recipes import MakeRecipe

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@pytest.fixture
def caught() -> Iterator[list[int]]:
    """The signals that reached the handlers installed before."""
    numbers: list[int] = []
    before = {number: signal.signal(number, lambda number, _: numbers.append(number)) for number in SIGNALS}
    yield numbers
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_recorded_and_the_second_acts(number: int, caught: list[int]):
    with catch_stop_signal() as stop:
        assert stop.number == 0
        signal.raise_signal(number)
        assert (stop.number, caught) == (number, [])
        signal.raise_signal(number)
        assert caught == [number]


def test_handlers_are_restored(caught: list[int]):
    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(SystemExit), catch_stop_signal():
        raise SystemExit(143)
    assert [signal.getsignal(number) for number in SIGNALS] == before


def accelerator(kind: DistributedType, *, version: int = 2, policy: object = None) -> Any:
    plugin = SimpleNamespace(auto_wrap_policy=policy)
    state = SimpleNamespace(fsdp_plugin=plugin)
    return SimpleNamespace(distributed_type=kind, is_fsdp2=version == 2, state=state)


def test_only_fsdp_needs_a_wrapper(text_to_image_recipe: MakeRecipe, autoencoder_recipe: MakeRecipe):
    plain, module = accelerator(DistributedType.MULTI_CPU), nn.Linear(2, 2)
    check_sharding(plain, autoencoder_recipe())
    assert wrap_for_sharding(plain, module) is module
    sharding = accelerator(DistributedType.FSDP)
    check_sharding(sharding, text_to_image_recipe("optimizer.name=adamw", "mixed_precision=bf16"))
    wrapped = wrap_for_sharding(sharding, nn.Linear(2, 3))
    assert isinstance(wrapped, ShardedModule)
    assert wrapped(torch.zeros(1, 2)).shape == (1, 3)


@pytest.mark.parametrize(
    ("options", "overrides", "field"),
    [
        ({"version": 1}, [], "fsdp_version"),
        ({"policy": print}, [], "fsdp_auto_wrap_policy"),
        ({}, ["optimizer.name=muon"], r"optimizer\.name muon"),
        ({}, ["compile=true"], "compile"),
        ({}, ["mixed_precision=fp16"], "mixed_precision fp16"),
        ({}, ["memory.offload_optimizer=true"], r"memory\.offload_optimizer"),
    ],
)
def test_unsupported_combinations_are_refused(
    options: dict[str, Any], overrides: list[str], field: str, text_to_image_recipe: MakeRecipe
):
    config = text_to_image_recipe("optimizer.name=adamw", *overrides)
    with pytest.raises(ConfigError, match=field):
        check_sharding(accelerator(**{"kind": DistributedType.FSDP, **options}), config)


def test_the_autoencoder_is_refused(autoencoder_recipe: MakeRecipe):
    with pytest.raises(ConfigError, match=r"task\.kind autoencoder"):
        check_sharding(accelerator(DistributedType.FSDP), autoencoder_recipe("optimizer.name=adamw"))


def test_deepspeed_is_refused_and_fsdp2_named(
    text_to_image_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ConfigError, match=r"DeepSpeed.*fsdp_version 2"):
        build_accelerator(text_to_image_recipe())


def test_unsharded_tensors_pass_through():
    tensor, other = torch.zeros(2), torch.ones(2)
    assert full_tensor(tensor) is tensor
    assert shard_like(tensor, other) is other
    assert full_tensors({"a": tensor}, keep=True)["a"] is tensor
    assert full_tensors({"a": tensor}, keep=False) == {}
