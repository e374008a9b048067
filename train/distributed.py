"""The processes of a run: Accelerate's setup, sharded weights, shared work, and how all start, stop and fail."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType, GradientAccumulationPlugin, ProjectConfiguration
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from latentgen.errors import ConfigError, LostProcessError, ResumeError
from latentgen.files import quote
from latentgen.train.config import AutoencoderTask, TrainConfig
from latentgen.train.optimizer.chained import import_bitsandbytes_adamw

T = TypeVar("T")


def build_accelerator(config: TrainConfig) -> Accelerator:
    """The Accelerator of a run, with the recipe's precision, gradient accumulation and trackers.

    Raises:
        ConfigError: the recipe cannot run on this machine, or in this number of processes.
    """
    accumulated = config.gradient_accumulation_steps
    for name in config.trackers:
        if find_spec(name) is None:  # Accelerate would skip it silently
            raise ConfigError(f"trackers: {name} is not installed; run `pip install {name}`, or leave it out")
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise ConfigError(
            "Accelerate's configuration asks for DeepSpeed, which is not supported; run `accelerate config` and choose "
            "FSDP with fsdp_version 2 (fsdp_reshard_after_forward: false keeps the weights whole, as ZeRO-2 does)"
        )
    if config.optimizer.name == "adamw8bit":
        import_bitsandbytes_adamw()
    try:
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            # A plugin, because an environment variable would override a plain number.
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=accumulated, sync_with_dataloader=False
            ),
            step_scheduler_with_optimizer=False,
            log_with=list(config.trackers) or None,
            project_config=ProjectConfiguration(logging_dir=str(config.output_dir / "tensorboard")),
        )
    except ValueError as error:
        raise ConfigError(f"mixed_precision {config.mixed_precision} cannot be used here: {error}") from None
    check_sharding(accelerator, config)
    if config.mixed_precision == "fp16" and accelerator.scaler is None:
        raise ConfigError("mixed_precision fp16 needs an accelerator, and there is none here; use bf16 or no")
    if (field := config.takes_gradients) is not None and accelerator.num_processes > 1:
        raise ConfigError(f"{field} does not work in {accelerator.num_processes} processes")
    if config.memory.offload_optimizer:
        problem = f"memory.offload_optimizer has no effect on {accelerator.device.type}"
        if accelerator.device.type == "mps":
            raise ConfigError(f"{problem}; set it to false")
        if (
            accelerator.device.type == "cpu"
        ):  # earlier versions used the disk here, and their runs can be resumed
            warnings.warn(f"{problem}, and will be an error; set it to false", FutureWarning, stacklevel=2)
    if config.batch_size % (accumulated * accelerator.num_processes):
        raise ConfigError(
            f"batch_size {config.batch_size} is not a multiple of {accumulated} gradient_accumulation_steps x "
            f"{accelerator.num_processes} processes"
        )
    return accelerator


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
        # Before it calls its blocks, the UNet uses layers inside them to compute what is constant over a run.
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


# The functions below do nothing to tensors that are not sharded, so callers need not check. All processes
# must call them, with the same tensors.


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor, gathered if each process holds only a shard."""
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


def own_share(items: Sequence[T]) -> Sequence[T]:
    """This process's part of a list that is the same in all processes; all of it if there is only one."""
    if not _is_distributed():
        return items
    return items[dist.get_rank() :: dist.get_world_size()]


def gather(items: Sequence[T]) -> list[T]:
    """The lists of all processes, one after the other; waits until every process has called with its own."""
    if not _is_distributed():
        return list(items)
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, list(items))
    return [item for part in parts for item in part]


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def check_same_start(accelerator: Accelerator, step: int | None, output_dir: Path) -> None:
    """Refuse, with a ResumeError, a run whose processes found checkpoints of different steps (None: no checkpoint)."""
    if accelerator.num_processes == 1:
        return
    own_step = torch.tensor([-1 if step is None else step], device=accelerator.device)
    steps: Any = accelerator.gather(own_step)
    if len(set(steps.tolist())) > 1:
        raise ResumeError(
            f"the processes find different checkpoints in output_dir {quote(output_dir)}: it must be one shared folder"
        )


@dataclass
class StopSignal:
    """The signal that was received; 0 if none."""

    number: int = 0


@contextmanager
def catch_stop_signal() -> Iterator[StopSignal]:
    """Inside the block the first SIGTERM or Ctrl-C is only recorded; a second one acts at once, as outside the block.

    Works in the main thread of a process only.
    """
    stop = StopSignal()
    # A handler that was not set from Python reads as None and cannot be set from here.
    previous = {
        number: signal.getsignal(number) or signal.SIG_DFL for number in (signal.SIGTERM, signal.SIGINT)
    }

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def record(number: int, _: FrameType | None) -> None:
        stop.number = number
        restore()

    for number in previous:
        signal.signal(number, record)
    try:
        yield stop
    finally:
        restore()


def agree_on_signal(accelerator: Accelerator, number: int) -> int:
    """The signal that any process received, or 0: each waits for the others in every step, so all stop together."""
    if accelerator.num_processes == 1:
        return number
    signals: Any = accelerator.gather(torch.tensor([number], device=accelerator.device))
    return int(signals.max())


@contextmanager
def reraise_lost_process() -> Iterator[None]:
    """Inside the block a broken connection to another process raises LostProcessError.

    Raises:
        LostProcessError: another process of the run ended.
    """
    try:
        yield
    except RuntimeError as error:
        # NCCL's errors have their own class; gloo's are recognized by the source path in the message.
        if not isinstance(error, dist.DistError) and "/gloo/" not in str(error):
            raise
        raise LostProcessError(
            "another process of this run ended, see its output; the last checkpoint is intact: start all of them "
            f"again with --set resume=latest ({str(error).splitlines()[0]})"
        ) from error
