"""Which runs can have sharded weights; test_processes.py trains with them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from torch import nn

from latentgen.errors import ConfigError
from latentgen.train.distributed import build_accelerator
from latentgen.train.fsdp import (
    ShardedModule,
    check_sharding,
    full_tensor,
    full_tensors,
    shard_like,
    wrap_for_sharding,
)
from tests.train.recipes import MakeRecipe


def accelerator(kind: DistributedType, *, version: int = 2, policy: object = None) -> Any:
    plugin = SimpleNamespace(auto_wrap_policy=policy)
    state = SimpleNamespace(fsdp_plugin=plugin)
    return SimpleNamespace(distributed_type=kind, is_fsdp2=version == 2, state=state)


@pytest.mark.parametrize("kind", [DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU])
def test_without_sharding_everything_is_allowed(kind: DistributedType, autoencoder_recipe: MakeRecipe):
    check_sharding(accelerator(kind), autoencoder_recipe())
    module = nn.Linear(2, 2)
    assert wrap_for_sharding(accelerator(kind), module) is module


def test_fsdp2_works_with_adamw(text_to_image_recipe: MakeRecipe):
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
