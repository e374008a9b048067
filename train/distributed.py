"""The processes of a run: Accelerate's setup, shared work, and how they start, stop and fail together."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration
from torch.utils.data import get_worker_info

from latentgen.errors import ConfigError, LostProcessError, ResumeError
from latentgen.files import quote
from latentgen.train.config import TrainConfig
from latentgen.train.fsdp import check_sharding
from latentgen.train.optimizer import check_optimizer

T = TypeVar("T")


def build_accelerator(config: TrainConfig) -> Accelerator:
    """Accelerate's precision, distribution and trackers on this machine.

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
    check_optimizer(config.optimizer)
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
        raise ConfigError(
            f"{field} works in one process only, because gradients are used or moved before all "
            f"{accelerator.num_processes} processes could average them; leave it out, or train in one process"
        )
    if config.memory.offload_optimizer:
        problem = (
            f"memory.offload_optimizer saves nothing on {accelerator.device.type}, whose memory is the host's"
        )
        if accelerator.device.type == "mps":
            raise ConfigError(f"{problem}; set it to false")
        if accelerator.device.type == "cpu":  # where it once used the disk; runs of that time can be resumed
            warnings.warn(f"{problem}, and will be an error; set it to false", FutureWarning, stacklevel=2)
    if config.batch_size % (accumulated * accelerator.num_processes):
        raise ConfigError(
            f"batch_size {config.batch_size} is not a multiple of {accumulated} gradient_accumulation_steps x "
            f"{accelerator.num_processes} processes"
        )
    return accelerator


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


def refuse_in_worker(device: torch.device, what: str) -> None:
    """Raise ConfigError in a data-loading worker if `what` runs on an accelerator, which workers cannot use."""
    if device.type != "cpu" and get_worker_info() is not None:
        raise ConfigError(
            f"{what} runs on {device.type}, which data-loading workers cannot use; set workers to 0"
        )


def check_same_start(accelerator: Accelerator, step: int | None, output_dir: Path) -> None:
    """Refuse a run whose processes found different checkpoints.

    Args:
        accelerator: of this process.
        step: of the checkpoint that this process resumes from; None for a new run.
        output_dir: where it looked.

    Raises:
        ResumeError: the processes look into different folders.
    """
    if accelerator.num_processes == 1:
        return
    own_step = torch.tensor([-1 if step is None else step], device=accelerator.device)
    steps: Any = accelerator.gather(own_step)
    if len(set(steps.tolist())) > 1:
        raise ResumeError(
            f"the processes find different checkpoints in {quote(output_dir)}: output_dir must be one folder that all "
            "of them share"
        )


def agree_on_signal(accelerator: Accelerator, signal: int) -> int:
    """The signal that any process received, or 0: each waits for the others in every step, so all stop together."""
    if accelerator.num_processes == 1:
        return signal
    signals: Any = accelerator.gather(torch.tensor([signal], device=accelerator.device))
    return int(signals.max())


@contextmanager
def reraise_lost_process() -> Iterator[None]:
    """Inside the block a broken connection to another process is an error of the library.

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
