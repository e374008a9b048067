"""A dry run: a few steps, to report what a recipe trains and how long it takes; nothing is saved."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from latentgen.train.config import FinetuneTask, TrainConfig
from latentgen.train.distributed import build_accelerator, gather
from latentgen.train.run_dir import state_to_resume
from latentgen.train.trainer import build_trainer

_STEPS = 3
_SECONDS = 20.0


@dataclass(frozen=True)
class DryRunReport:
    """The measurements of a dry run.

    `step` is where the run would resume; `trained` and `parameters`, `images`, `held_out` and `samples` (of an epoch,
    with all cached views of each image) are counts; `seconds_per_step` is the median over a few steps; `peak_bytes` is
    None where torch does not count the device's memory.
    """

    config: TrainConfig
    step: int
    trained: int
    parameters: int
    images: int
    held_out: int
    samples: int
    processes: int
    device: str
    seconds_per_step: float
    peak_bytes: int | None

    def lines(self) -> Iterator[str]:
        """The report as text."""
        config = self.config
        parts = config.gradient_accumulation_steps
        each = config.batch_size // (parts * self.processes)
        steps = max(0, config.max_steps - self.step)
        yield f"dry run: {config.task.kind} on {self.device}, mixed_precision {config.mixed_precision}"
        yield f"trained:  {self.trained:,} of {self.parameters:,} parameters"
        views = f", {self.samples:,} samples with their views" if self.samples != self.images else ""
        held_out = f"; {self.held_out:,} more for the validation loss" if self.held_out else ""
        yield f"images:   {self.images:,}{views}{held_out}"
        product = f"{each:,} samples x {self.processes} processes x {parts} accumulated parts"
        yield f"batch:    {config.batch_size:,} = {product}"
        per_epoch = self.samples / config.batch_size
        epochs = f"{per_epoch:,.4g} steps an epoch, {config.max_steps / per_epoch:,.4g} epochs"
        done = f", of which {self.step:,} are done" if self.step else ""
        yield f"steps:    {config.max_steps:,}{done}; {epochs}"
        if (unreached := config.optimizer.unreached(config.max_steps)) is not None:
            yield f"warning:  {unreached}"
        if self.peak_bytes is not None:
            yield f"memory:   {self.peak_bytes / 2**30:.1f} GiB on the device at its peak"
        rate = config.batch_size / self.seconds_per_step
        yield f"speed:    {self.seconds_per_step:.3g} s a step, {rate:.3g} samples/s"
        left = timedelta(seconds=round(steps * self.seconds_per_step))
        yield f"left:     {left} for {steps:,} steps, without checkpoints and validation"
        yield f"nothing was written; {config.output_dir} is unchanged"


def dry_run(config: TrainConfig) -> DryRunReport:
    """Open the data, build the objective, and train a few steps; nothing is written into the run's folder.

    Raises:
        LatentgenError: as `latentgen.train.trainer.train`.
    """
    accelerator = build_accelerator(config)
    state = state_to_resume(config)
    with TemporaryDirectory() as own_scratch:
        # One folder for all processes, which generate the class images together.
        scratch = Path(gather([own_scratch])[0])
        trial = _without_outputs(config, scratch)
        trainer, splits = build_trainer(trial, accelerator, state, assets=config.output_dir)
        accelerator.wait_for_everyone()
    objective = trainer.objective
    counts_memory = accelerator.device.type == "cuda"
    if counts_memory:
        torch.cuda.reset_peak_memory_stats(accelerator.device)
    seconds = trainer.try_steps(count=_STEPS, seconds=_SECONDS)
    return DryRunReport(
        config=config,
        step=0 if state is None else state.step,
        trained=trainer.trained_parameters,
        parameters=sum(parameter.numel() for parameter in objective.parameters()),
        images=len(splits.training),
        held_out=0 if splits.validation is None else len(splits.validation),
        samples=len(objective.order),
        processes=accelerator.num_processes,
        device=str(accelerator.device),
        seconds_per_step=statistics.median(seconds),
        peak_bytes=torch.cuda.max_memory_allocated(accelerator.device) if counts_memory else None,
    )


def _without_outputs(config: TrainConfig, scratch: Path) -> TrainConfig:
    """The recipe with output in `scratch`, and no more class images than one step needs."""
    task = config.task
    if isinstance(task, FinetuneTask) and task.prior is not None:
        prior = task.prior.model_copy(update={"images": min(task.prior.images, config.batch_size)})
        task = task.model_copy(update={"prior": prior})
    return config.model_copy(update={"output_dir": scratch, "task": task})
