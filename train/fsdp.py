"""Weights sharded over the processes of a run with FSDP2, gathered for checkpoints and sharded again.

Tensors that are not sharded pass through, so callers need not know. All processes must call, with the same tensors.
"""

from __future__ import annotations

from collections.abc import Mapping

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from latentgen.errors import ConfigError
from latentgen.train.config import AutoencoderTask, TrainConfig


def check_sharding(accelerator: Accelerator, config: TrainConfig) -> None:
    """Refuse what cannot be trained with sharded weights.

    Raises:
        ConfigError: Accelerate's configuration asks for another kind of FSDP, or the recipe cannot be combined with it.
    """
    if accelerator.distributed_type != DistributedType.FSDP:
        return
    if not accelerator.is_fsdp2:
        raise ConfigError("weights are sharded with the second version of FSDP only; set fsdp_version: 2")
    plugin = accelerator.state.fsdp_plugin
    refused = {
        # The UNet computes what is constant over a run from inside its blocks before it calls them.
        "an fsdp_auto_wrap_policy (use NO_WRAP)": plugin is not None and plugin.auto_wrap_policy is not None,
        f"optimizer.name {config.optimizer.name} (use adamw)": config.optimizer.name != "adamw",
        f"task.kind {config.task.kind}": isinstance(config.task, AutoencoderTask),
        "compile": config.compile,
        "optimizer.step_in_backward": config.optimizer.step_in_backward,
        "memory.offload_optimizer": config.memory.offload_optimizer,
        "memory.ema_device cpu": config.memory.ema_device == "cpu",
        "validation": config.validation is not None,
        "mixed_precision fp16 (use bf16)": config.mixed_precision == "fp16",
    }
    for what, is_set in refused.items():
        if is_set:
            raise ConfigError(f"{what} does not work with sharded weights; change it or train without FSDP")


class ShardedModule(nn.Module):
    """A wrapper for FSDP to shard: FSDP changes the class of the module it receives, here this one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *inputs: Tensor) -> object:
        """The inner module's output."""
        return self.inner(*inputs)


def wrap_for_sharding(accelerator: Accelerator, module: nn.Module) -> nn.Module:
    """The module to pass to `accelerator.prepare`: itself, or in a ShardedModule if FSDP will shard it."""
    return ShardedModule(module) if accelerator.distributed_type == DistributedType.FSDP else module


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor of which each process may hold a shard."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_tensors(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Full tensors, on the CPU if they were sharded; empty in a process that does not `keep` them."""
    result = {}
    for name, tensor in tensors.items():
        full = full_tensor(tensor)
        if keep:
            result[name] = full.cpu() if isinstance(tensor, DTensor) else full
    return result


def shard_like(target: Tensor, source: Tensor) -> Tensor:
    """A full tensor, the same in all processes, sharded as `target` is."""
    if not isinstance(target, DTensor):
        return source
    device = target.to_local().device
    return distribute_tensor(source.to(device), target.device_mesh, target.placements)


def unshard_module(module: nn.Module, *, keep: bool) -> None:
    """Replace a module's shards with full parameters on the CPU: it can be saved then, but no longer trained.

    In a process that does not `keep` them the shards stay.
    """
    for child in module.modules():
        shards = {n: p for n, p in child.named_parameters(recurse=False) if isinstance(p, DTensor)}
        for name, shard in shards.items():
            full = full_tensor(shard.detach())
            if keep:
                child.register_parameter(name, nn.Parameter(full.cpu(), shard.requires_grad))
        if shards and keep:
            # FSDP's hooks expect shards.
            child._state_dict_pre_hooks.clear()
            child._load_state_dict_post_hooks.clear()
