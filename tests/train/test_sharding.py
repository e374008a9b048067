"""Which runs can have sharded weights, or DeepSpeed; test_processes.py and test_zero.py train with them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DeepSpeedPlugin, DistributedType
from torch import nn

from latentgen.errors import ConfigError, NumericalError
from latentgen.train import zero
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
        ({"version": 1}, [], "set fsdp_version: 2"),
        ({"policy": print}, [], "an fsdp_auto_wrap_policy .NO_WRAP does. does not go with weights"),
        ({}, ["optimizer.name=muon"], "optimizer.name muon .adamw does. does not go with weights"),
        ({}, ["compile=true"], "compile does not go with weights"),
        ({}, ["mixed_precision=fp16"], "mixed_precision fp16 .bf16 does. does not go with weights"),
        ({}, ["memory.offload_optimizer=true"], "memory.offload_optimizer does not go with weights"),
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


def with_deepspeed(*, enabled: str = "no", **settings: Any) -> Any:
    plugin = DeepSpeedPlugin(hf_ds_config={"zero_optimization": {"stage": 2}, **settings})
    return SimpleNamespace(
        distributed_type=DistributedType.DEEPSPEED,
        deepspeed_plugin=plugin,
        mixed_precision=enabled,
        num_processes=2,
    )


@pytest.mark.parametrize("stage", [1, 2])
def test_deepspeed_goes_with_adamw(stage: int, text_to_image_recipe: MakeRecipe):
    config = text_to_image_recipe(
        "optimizer.name=adamw", "mixed_precision=bf16", "gradient_accumulation_steps=2"
    )
    # What the recipe decides may be said as well, if it is the same.
    same = {"gradient_clipping": 1.0, "train_batch_size": 4, "train_micro_batch_size_per_gpu": "auto"}
    check_sharding(
        with_deepspeed(enabled="bf16", zero_optimization={"stage": stage}, bf16={"enabled": True}, **same),
        config,
    )


@pytest.mark.parametrize(
    ("settings", "overrides", "message"),
    [
        ({"zero_optimization": {"stage": 3}}, [], "zero_stage is 3, and 1 and 2 .*FSDP with fsdp_version 2"),
        ({"zero_optimization": {"stage": 0}}, [], "zero_stage is 0, and 1 and 2 are supported"),
        (
            {},
            ["optimizer.name=adafactor"],
            "optimizer.name adafactor .adamw does. does not go with DeepSpeed",
        ),
        ({}, ["compile=true"], "compile does not go with DeepSpeed"),
        ({}, ["mixed_precision=fp16"], "mixed_precision fp16 .bf16 does. does not go with DeepSpeed"),
        (
            {},
            ["optimizer.step_in_backward=true", "optimizer.max_grad_norm=null"],
            "optimizer.step_in_backward does not go with DeepSpeed",
        ),
        ({}, ["memory.offload_optimizer=true"], "memory.offload_optimizer does not go with DeepSpeed"),
        (
            {},
            ["optimizer.text_encoder_learning_rate=0.001"],
            "optimizer.text_encoder_learning_rate does not go with DeepSpeed",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            [],
            "offload_optimizer_device cpu does not go with DeepSpeed",
        ),
        (
            {"optimizer": {"type": "AdamW"}},
            [],
            "has optimizer, which is the recipe's or not supported; remove",
        ),
        (
            {"zero_optimization": {"stage": 2, "round_robin_gradients": True}},
            [],
            "has zero_optimization.round_robin_gradients, which is the recipe's or not supported",
        ),
        ({"gradient_clipping": 0.5}, [], "says gradient_clipping 0.5, and the recipe 1.0; write auto there"),
        ({"gradient_accumulation_steps": 4}, [], "says gradient_accumulation_steps 4, and the recipe 1"),
        ({"enabled": "bf16"}, [], "enables bf16, and the recipe says mixed_precision no; remove it there"),
    ],
)
def test_what_does_not_go_with_deepspeed_is_refused(
    settings: dict[str, Any], overrides: list[str], message: str, text_to_image_recipe: MakeRecipe
):
    config = text_to_image_recipe("optimizer.name=adamw", *overrides)
    with pytest.raises(ConfigError, match=message):
        check_sharding(with_deepspeed(**settings), config)


def test_deepspeed_that_is_not_installed_is_asked_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(zero, "is_deepspeed_available", lambda: False)
    zero.check_installed()
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ConfigError, match="run `DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed`"):
        zero.check_installed()


def test_a_step_that_deepspeed_skips_is_an_error():
    parameters = [nn.Parameter(torch.zeros(2))]
    outer = SimpleNamespace(step_was_skipped=False)
    optimizer = zero.PartitionedAdamW(parameters, torch.optim.AdamW(parameters), outer, keep=True)
    optimizer.step()
    outer.step_was_skipped = True
    with pytest.raises(NumericalError, match="the gradient is not finite; "):
        optimizer.step()


def test_tensors_that_are_not_spread_pass_through():
    tensor, other = torch.zeros(2), torch.ones(2)
    assert whole(tensor) is tensor
    assert spread_like(tensor, other) is other
    assert gathered({"a": tensor}, keep=True)["a"] is tensor
    assert gathered({"a": tensor}, keep=False) == {}
