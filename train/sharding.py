"""Weights that are spread over the processes of a run (FSDP2), made whole for checkpoints and spread again.

Tensors that are not spread pass through, so callers need not know. All processes must call, with the same tensors.
DeepSpeed, which leaves the weights whole, is asked for here, too; see `latentgen.train.zero`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from latentgen.errors import ConfigError
from latentgen.train.config import AutoencoderTask, TrainConfig
from latentgen.train.zero import check_zero, prepared_for_zero


def check_sharding(accelerator: Accelerator, config: TrainConfig) -> None:
    """Refuse what cannot be trained with sharded weights, or with DeepSpeed.

    Raises:
        ConfigError: Accelerate's configuration asks for another kind of sharding, or the recipe does not go with it.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        check_zero(accelerator, config)
    if accelerator.distributed_type != DistributedType.FSDP:
        return
    if not accelerator.is_fsdp2:
        raise ConfigError("weights are sharded with FSDP's second version alone; set fsdp_version: 2")
    plugin = accelerator.state.fsdp_plugin
    refused = {
        # The UNet computes what is constant over a run from inside its blocks before it calls them.
        "an fsdp_auto_wrap_policy (NO_WRAP does)": plugin is not None and plugin.auto_wrap_policy is not None,
        f"optimizer.name {config.optimizer.name} (adamw does)": config.optimizer.name != "adamw",
        f"task.kind {config.task.kind}": isinstance(config.task, AutoencoderTask),
        "compile": config.compile,
        "optimizer.step_in_backward": config.optimizer.step_in_backward,
        "memory.offload_optimizer": config.memory.offload_optimizer,
        "memory.ema_device cpu": config.memory.ema_device == "cpu",
        "validation": config.validation is not None,
        "mixed_precision fp16 (bf16 does)": config.mixed_precision == "fp16",
    }
    for what, is_asked in refused.items():
        if is_asked:
            raise ConfigError(
                f"{what} does not go with weights that are sharded; change it or train without FSDP"
            )


class Shell(nn.Module):
    """A module around one that FSDP shall shard: FSDP changes the class of what it is given, here this one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *inputs: Tensor) -> object:
        """As the inner module's."""
        return self.inner(*inputs)


def shell_for(accelerator: Accelerator, module: nn.Module) -> nn.Module:
    """The module to prepare for training: itself, or a shell around it if it will be sharded."""
    return Shell(module) if accelerator.distributed_type == DistributedType.FSDP else module


def prepared(
    accelerator: Accelerator, config: TrainConfig, module: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """What to call in the place of a module that is trained, and of its optimiser."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        computed_in = partial(precision, accelerator, config)
        return prepared_for_zero(accelerator, config, module, optimizer, computed_in)
    return accelerator.prepare(shell_for(accelerator, module), optimizer)


def precision(accelerator: Accelerator, config: TrainConfig) -> AbstractContextManager[Any]:
    """That in which the networks of a recipe are computed, which Accelerate leaves to DeepSpeed if there is one."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED and config.mixed_precision == "bf16":
        return torch.autocast(accelerator.device.type, torch.bfloat16)
    return accelerator.autocast()


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor of which each process has a part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Whole tensors, on the CPU if they were spread; none in a process that does not `keep` them."""
    result = {}
    for name, tensor in tensors.items():
        found = whole(tensor)
        if keep:
            result[name] = found.cpu() if isinstance(tensor, DTensor) else found
    return result


def spread_like(target: Tensor, source: Tensor) -> Tensor:
    """A whole tensor, the same in all processes, spread as `target` is."""
    if not isinstance(target, DTensor):
        return source
    device = target.to_local().device
    return distribute_tensor(source.to(device), target.device_mesh, target.placements)


def put_together(module: nn.Module, *, keep: bool) -> None:
    """Give a module whole parameters on the CPU in place of its parts: it can be saved then, and not be trained.

    In a process that does not `keep` them they are left as they are.
    """
    for child in module.modules():
        parts = {n: p for n, p in child.named_parameters(recurse=False) if isinstance(p, DTensor)}
        for name, part in parts.items():
            full = whole(part.detach())
            if keep:
                child.register_parameter(name, nn.Parameter(full.cpu(), part.requires_grad))
        if parts and keep:
            # FSDP's, which look for the parts.
            child._state_dict_pre_hooks.clear()
            child._load_state_dict_post_hooks.clear()
