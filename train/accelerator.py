"""Accelerate's part of a run: precision, distribution and trackers, if the recipe fits this machine."""

from __future__ import annotations

from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration

from latentgen.errors import ConfigError
from latentgen.train.config import TrainConfig
from latentgen.train.optimizer import check_optimizer
from latentgen.train.run_log import check_trackers
from latentgen.train.sharding import check_sharding
from latentgen.train.zero import check_installed


def build_accelerator(config: TrainConfig) -> Accelerator:
    """Accelerate's view of this machine, if the recipe fits it; see `latentgen.train.trainer.train` for the errors."""
    parts = config.gradient_accumulation_steps
    check_trackers(config.trackers)
    check_installed()
    check_optimizer(config.optimizer)
    try:
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            # As a plugin: the plain number would give way to a variable of the environment.
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=parts, sync_with_dataloader=False
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
    if (taking := config.takes_gradients) is not None and accelerator.num_processes > 1:
        raise ConfigError(
            f"{taking}: gradients are used up or sent away before {accelerator.num_processes} processes have agreed on "
            "them; leave it out, or train in one process"
        )
    if config.batch_size % (parts * accelerator.num_processes):
        raise ConfigError(
            f"batch_size {config.batch_size} is not a multiple of {parts} gradient_accumulation_steps x "
            f"{accelerator.num_processes} processes"
        )
    return accelerator
