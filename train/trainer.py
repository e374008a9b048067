"""The one training loop: Accelerate does precision and distribution, an objective does the learning."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, GradientAccumulationPlugin
from torch import Tensor, nn
from tqdm import tqdm

from latentgen.errors import ConfigError, NumericalError, ResumeError
from latentgen.train.checkpoint import RunState, flatten_optimizer, restore_optimizer, save_checkpoint
from latentgen.train.config import AutoencoderTask, FinetuneTask, PairedTask, TrainConfig, UpscaleTask
from latentgen.train.data import BatchPlan, CaptionedImages, open_data, plan_step, sample_rng
from latentgen.train.interrupt import StopSignal
from latentgen.train.objectives.autoencoder import AutoencoderObjective
from latentgen.train.objectives.base import Loss, Objective
from latentgen.train.optimizer import build_optimizer
from latentgen.train.run_folder import LOG, run_lock, starting_state, trim_log

_AFTER_NAN = (
    "lower optimizer.learning_rate, or train with mixed_precision bf16 or no; the last checkpoint is intact"
)


def train(config: TrainConfig) -> Path:
    """Run a recipe, from its start or its latest checkpoint, to the finished model; returns the model's folder.

    A first SIGTERM or Ctrl-C ends the run after the step at hand, with a checkpoint and SystemExit(143 or 130).

    Raises:
        ConfigError: the recipe does not fit this machine, the data, or its own parts.
        DatasetError: the training set has problems.
        CheckpointError: a model that the recipe builds on cannot be used.
        ResumeError: the run exists and resume is off, or there is nothing to resume, or the recipe has changed.
        RunLockedError: another process writes into the same folder.
        NumericalError: the loss or the weights are not finite.
        OutputError: the folder cannot be written.
    """
    accelerator = _accelerator(config)
    output_dir = config.output_dir
    with run_lock(output_dir, enabled=accelerator.is_main_process):
        state = starting_state(config)
        torch.manual_seed(config.seed)
        assets = None if state is None else output_dir
        objective = build_objective(config, device=accelerator.device, assets=assets)
        trainer = Trainer(config, accelerator, objective)
        if state is not None:
            trainer.restore(state)
        if accelerator.is_main_process:
            trim_log(output_dir, trainer.step)
            if state is None:
                objective.save_assets(output_dir)
        trainer.run()
        if accelerator.is_main_process:
            trainer.save_model(output_dir / "model")
        accelerator.wait_for_everyone()
    accelerator.end_training()
    return output_dir / "model"


class Trainer:
    """The loop over the steps of one run, and the state that it moves forward.

    Attributes:
        objective: what is learnt.
        trainable: its parameters that require gradients, by name.
        ema: their exponential moving average; empty if the recipe asks for none.
        step: optimiser steps done.
    """

    def __init__(self, config: TrainConfig, accelerator: Accelerator, objective: Objective) -> None:
        self.config = config
        self.accelerator = accelerator
        self.objective = objective
        # Before the optimiser is built, which may hold views of the weights.
        objective.to(accelerator.device)
        objective.to(memory_format=objective.memory_format)
        self.trainable = {name: p for name, p in objective.named_parameters() if p.requires_grad}
        averaged = self.trainable if config.ema_decay else {}
        self.ema = {name: p.detach().clone() for name, p in averaged.items()}
        self.step = 0
        if config.compile:
            objective.compile_networks()
        optimizer = build_optimizer(objective, config.optimizer)
        self._model: nn.Module
        self._optimizer: torch.optim.Optimizer
        self._model, self._optimizer = accelerator.prepare(objective, optimizer)

    def restore(self, state: RunState) -> None:
        """Go on from a checkpoint.

        Raises:
            ResumeError: it holds other parameters than this run.
        """
        _copy_into(self.trainable, state.weights)
        _copy_into(self.ema, state.ema)
        restore_optimizer(self._optimizer, state.optimizer)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(dict(state.scaler))
        self.step = state.step

    def run(self) -> None:
        """Train to the last step of the recipe, with checkpoints on the way and at the end.

        Raises:
            NumericalError: the loss or the weights are not finite.
            OutputError: a checkpoint could not be written.
            SystemExit: 128 + the signal's number, after a checkpoint, if SIGTERM or Ctrl-C came.
        """
        config = self.config
        self._model.train()
        bar = tqdm(
            range(self.step, config.max_steps),
            initial=self.step,
            total=config.max_steps,
            desc=config.task.kind,
            disable=not self.accelerator.is_main_process,
            mininterval=1.0,
        )
        with StopSignal() as stop, bar:
            for step in bar:
                losses = self._update(step)
                self.step = step + 1
                signal = self._agree(stop.number)
                saving = signal or self.step == config.max_steps or self.step % config.checkpoint_every == 0
                if saving or self.step % config.log_every == 0:
                    self._report(bar, losses)
                if saving:
                    self._save_checkpoint()
                if signal:
                    raise SystemExit(128 + signal)

    def save_model(self, folder: Path) -> None:
        """Write the finished model, from the moving average if there is one; nothing can be trained afterwards.

        Raises:
            OutputError: a file could not be written.
        """
        self.objective.cpu().save(folder, {**self.objective.state_dict(), **self.ema})

    def _update(self, step: int) -> dict[str, Tensor]:
        """One optimiser step over the global batch; returns this process's mean losses by name, on the device."""
        config = self.config
        plans = plan_step(
            config.seed,
            step,
            batch_size=config.batch_size,
            count=self.objective.item_count,
            parts=config.gradient_accumulation_steps,
            rank=self.accelerator.process_index,
            processes=self.accelerator.num_processes,
        )
        for group in self._optimizer.param_groups:
            group["lr"] = config.optimizer.rate_at(step, config.max_steps)
        losses: dict[str, Tensor] = {}
        for plan in plans:
            with self.accelerator.accumulate(self._model):
                loss = self._loss(plan)
                self.accelerator.backward(loss.total)
                for name, value in {"loss": loss.total, **loss.parts}.items():
                    losses[name] = losses.get(name, 0) + value.detach() / len(plans)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.trainable.values(), config.optimizer.max_grad_norm)
                self._optimizer.step()
                self._optimizer.zero_grad()
        self._update_ema(step)
        return losses

    def _loss(self, plan: BatchPlan) -> Loss:
        batch = (tensor.to(self.accelerator.device) for tensor in self.objective.batch(plan))
        # For dropout, which draws from the global generator: after resuming it draws what it would have drawn.
        torch.manual_seed(sample_rng(plan.seed, "network", plan.step, plan.samples[0]).getrandbits(63))
        return self._model(*batch)

    @torch.no_grad()
    def _update_ema(self, step: int) -> None:
        """Move the average towards the weights, faster at first so that it forgets the initialisation."""
        decay = min(self.config.ema_decay, (1 + step) / (10 + step))
        for name, average in self.ema.items():
            average.lerp_(self.trainable[name], 1 - decay)

    def _agree(self, signal: int) -> int:
        """The signal that any process got, or 0: as each waits for the others in every step, all must stop together."""
        if self.accelerator.num_processes == 1:
            return signal
        signals: Any = self.accelerator.gather(torch.tensor([signal], device=self.accelerator.device))
        return int(signals.max())

    def _report(self, bar: tqdm[int], losses: Mapping[str, Tensor]) -> None:
        means: Any = self.accelerator.reduce(dict(losses), "mean")
        values = {name: float(mean) for name, mean in means.items()}
        if not all(map(math.isfinite, values.values())):
            raise NumericalError(f"the loss is not finite at step {self.step}: {values}; {_AFTER_NAN}")
        bar.set_postfix({name: f"{value:.4g}" for name, value in values.items()}, refresh=False)
        if self.accelerator.is_main_process:
            with (self.config.output_dir / LOG).open("a", encoding="utf-8") as log:
                log.write(json.dumps({"step": self.step, **values}) + "\n")

    def _save_checkpoint(self) -> None:
        for name, parameter in self.trainable.items():
            if not parameter.isfinite().all():
                raise NumericalError(f"{name} is not finite after step {self.step}; {_AFTER_NAN}")
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            state = RunState(
                step=self.step,
                config=self.config.model_dump(mode="json"),
                weights={name: p.detach() for name, p in self.trainable.items()},
                ema=self.ema,
                optimizer=flatten_optimizer(self._optimizer),
                scaler={} if scaler is None else scaler.state_dict(),
            )
            save_checkpoint(self.config.output_dir, state, keep=self.config.keep_checkpoints)
        self.accelerator.wait_for_everyone()


def build_objective(config: TrainConfig, *, device: torch.device, assets: Path | None = None) -> Objective:
    """The objective of a recipe, on the CPU, its networks initialised at random or from `init_from`.

    Args:
        config: the recipe.
        device: where the data may be prepared.
        assets: where an earlier part of the run has left its assets, if this is to go on with it.
    """
    data = open_data(config.data)
    if isinstance(config.task, AutoencoderTask):
        return AutoencoderObjective(config.task, data, init_from=config.init_from)
    if isinstance(config.task, UpscaleTask):
        from latentgen.train.objectives.upscale import UpscaleObjective

        return UpscaleObjective(
            config.task, data, seed=config.seed, device=device, init_from=config.init_from
        )
    if isinstance(config.task, PairedTask):
        from latentgen.train.objectives.paired import PairedObjective

        return PairedObjective(config.task, data, seed=config.seed, device=device, init_from=config.init_from)
    if isinstance(config.task, FinetuneTask):
        return _finetuning(config, config.task, data, device)
    from latentgen.train.objectives.text_to_image import TextToImageObjective

    return TextToImageObjective(
        config.task, data, seed=config.seed, device=device, init_from=config.init_from, assets=assets
    )


def _finetuning(
    config: TrainConfig, task: FinetuneTask, data: CaptionedImages, device: torch.device
) -> Objective:
    from latentgen.train.objectives.finetune import FinetuneObjective, Origin

    origin = Origin(config.init_from, config.output_dir / "class_images")
    return FinetuneObjective(task, data, seed=config.seed, device=device, origin=origin)


def _accelerator(config: TrainConfig) -> Accelerator:
    """Accelerate's view of this machine, and whether the recipe fits it."""
    parts = config.gradient_accumulation_steps
    try:
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            # As a plugin: the plain number would give way to a variable of the environment.
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=parts, sync_with_dataloader=False
            ),
            step_scheduler_with_optimizer=False,
        )
    except ValueError as error:
        raise ConfigError(f"mixed_precision {config.mixed_precision} cannot be used here: {error}") from None
    if config.mixed_precision == "fp16" and accelerator.scaler is None:
        raise ConfigError("mixed_precision fp16 needs an accelerator, and there is none here; use bf16 or no")
    if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP):
        raise ConfigError(
            "weights cannot be sharded in training; let `accelerate config` choose neither of them"
        )
    if config.batch_size % (parts * accelerator.num_processes):
        raise ConfigError(
            f"batch_size {config.batch_size} is not a multiple of {parts} gradient_accumulation_steps x "
            f"{accelerator.num_processes} processes"
        )
    return accelerator


def _copy_into(targets: Mapping[str, Tensor], sources: Mapping[str, Tensor]) -> None:
    if {name: t.shape for name, t in targets.items()} != {name: t.shape for name, t in sources.items()}:
        differing = sorted(targets.keys() ^ sources.keys()) or "shapes differ"
        raise ResumeError(
            f"the checkpoint was made by other code, its parameters are not those of this run: {differing}"
        )
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(sources[name])
