"""Which runs can have sharded weights; tests/train/test_processes.py trains with them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from torch import nn

from latentgen.errors import ConfigError
from latentgen.train.sharding import Shell, check_sharding, gathered, shell_for, spread_like, whole
from tests.train.recipes import MakeRecipe


def accelerator(kind: DistributedType, *, version: int = 2, policy: object = None) -> Any:
    plugin = SimpleNamespace(auto_wrap_policy=policy)
    state = SimpleNamespace(fsdp_plugin=plugin)
    return SimpleNamespace(distributed_type=kind, is_fsdp2=version == 2, state=state)


@pytest.mark.parametrize("kind", [DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU])
def test_without_sharding_everything_goes(kind: DistributedType, autoencoder_recipe: MakeRecipe):
    check_sharding(accelerator(kind), autoencoder_recipe())
    module = nn.Linear(2, 2)
    assert shell_for(accelerator(kind), module) is module


def test_fsdp2_goes_with_adamw(text_to_image_recipe: MakeRecipe):
    sharding = accelerator(DistributedType.FSDP)
    check_sharding(sharding, text_to_image_recipe("optimizer.name=adamw", "mixed_precision=bf16"))
    shell = shell_for(sharding, nn.Linear(2, 3))
    assert isinstance(shell, Shell)
    assert shell(torch.zeros(1, 2)).shape == (1, 3)


@pytest.mark.parametrize(
    ("options", "overrides", "message"),
    [
        ({"kind": DistributedType.DEEPSPEED}, [], "DeepSpeed is not supported"),
        ({"version": 1}, [], "set fsdp_version: 2"),
        ({"policy": print}, [], "an fsdp_auto_wrap_policy .NO_WRAP does. does not go with weights"),
        ({}, ["optimizer.name=muon"], "optimizer.name muon .adamw does. does not go with weights"),
        ({}, ["compile=true"], "compile does not go with weights"),
        ({}, ["mixed_precision=fp16"], "mixed_precision fp16 .bf16 does. does not go with weights"),
    ],
)
def test_others_are_refused(
    options: dict[str, Any], overrides: list[str], message: str, text_to_image_recipe: MakeRecipe
):
    config = text_to_image_recipe("optimizer.name=adamw", *overrides)
    with pytest.raises(ConfigError, match=message):
        check_sharding(accelerator(**{"kind": DistributedType.FSDP, **options}), config)


def test_the_autoencoder_is_refused(autoencoder_recipe: MakeRecipe):
    with pytest.raises(ConfigError, match=r"task\.kind autoencoder does not go"):
        check_sharding(accelerator(DistributedType.FSDP), autoencoder_recipe("optimizer.name=adamw"))


def test_tensors_that_are_not_spread_pass_through():
    tensor, other = torch.zeros(2), torch.ones(2)
    assert whole(tensor) is tensor
    assert spread_like(tensor, other) is other
    assert gathered({"a": tensor}, keep=True)["a"] is tensor
    assert gathered({"a": tensor}, keep=False) == {}
