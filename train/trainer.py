"""The training loop: Accelerate handles precision and distribution, an objective computes the loss."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from latentgen.checkpoints.weights import first_five
from latentgen.errors import NumericalError, ResumeError
from latentgen.files import atomic_folder
from latentgen.train.checkpoint import (
    RunState,
    delete_old_checkpoints,
    flatten_optimizer,
    restore_optimizer,
    save_checkpoint,
)
from latentgen.train.config import TrainConfig
from latentgen.train.data import BatchIndices, CaptionedDataset, Splits, open_splits, plan_step, sample_rng
from latentgen.train.data_loader import PlannedBatch, load_batches
from latentgen.train.distributed import (
    agree_on_signal,
    build_accelerator,
    catch_stop_signal,
    check_same_start,
    full_tensor,
    full_tensors,
    reraise_lost_process,
    shard_like,
    unshard_module,
    wrap_for_sharding,
)
from latentgen.train.host_memory import release_freed_memory
from latentgen.train.memory import apply_memory_options, check_memory
from latentgen.train.metrics import NAN_ADVICE, Metrics
from latentgen.train.model_card import write_card
from latentgen.train.networks import compile_networks, memory_format_for, text_parameters
from latentgen.train.objectives import build_objective
from latentgen.train.objectives.base import Loss, Objective, Subset
from latentgen.train.objectives.text_to_image import TextToImageObjective
from latentgen.train.optimizer import build_optimizer
from latentgen.train.optimizer.offloaded import OffloadedGradients
from latentgen.train.run_dir import check_same_data, run_lock, state_to_resume
from latentgen.train.validation import Validator, check_validation


def train(config: TrainConfig) -> Path:
    """Run a recipe, from its start or its latest checkpoint, to the finished model; returns the model's folder.

    The first SIGTERM or Ctrl-C ends the run after the current step, with a checkpoint and SystemExit(143 or 130).

    Raises:
        ConfigError: the recipe cannot run on this machine or with this data, or its fields contradict each other.
        InputError: a validation prompt cannot be rendered.
        DatasetError: the training set has errors.
        CheckpointError: a model that the recipe builds on cannot be used.
        ResumeError: `resume` does not fit what the folder holds, or the recipe or the training set has changed.
        RunLockedError: another process writes into the same folder.
        MemoryBudgetError: a step does not fit into the device's memory.
        NumericalError: the loss or the weights are not finite.
        LostProcessError: another process of the run, or a data-loading worker, died.
        OutputError: the folder cannot be written.
    """
    accelerator = build_accelerator(config)
    output_dir, is_main = config.output_dir, accelerator.is_main_process
    with run_lock(output_dir, enabled=is_main), reraise_lost_process():
        state = state_to_resume(config, processes=accelerator.num_processes, quiet=not is_main)
        check_same_start(accelerator, None if state is None else state.step, output_dir)
        trainer, splits = build_trainer(config, accelerator, state, assets=output_dir)
        if state is not None:
            trainer.restore(state)
        if is_main:
            if state is not None:  # the run may have been killed before it deleted them
                delete_old_checkpoints(output_dir, state.step, config.keep_checkpoints)
            elif isinstance(trainer.objective, TextToImageObjective):
                trainer.objective.save_tokenizer(output_dir)
            if (unreached := config.optimizer.unreached(config.max_steps)) is not None:
                print(f"warning: {unreached}", file=sys.stderr)
        trainer.metrics.start(trainer.step)
        trainer.run()
        trainer.save_model(output_dir / "model", images=len(splits.training))
        accelerator.wait_for_everyone()
    accelerator.end_training()
    return output_dir / "model"


def build_trainer(
    config: TrainConfig, accelerator: Accelerator, state: RunState | None, *, assets: Path
) -> tuple[Trainer, Splits]:
    """Open the data and build the objective and its trainer, which does not have the weights of `state` yet.

    `state` is the checkpoint to resume from, of the run in the folder `assets`.
    """
    torch.manual_seed(config.seed)
    splits = open_splits(config)
    if state is not None:
        check_same_data(state, splits.digest, config, quiet=not accelerator.is_main_process)

    def preflight(objective: Objective) -> None:
        if config.validation is not None:
            check_validation(config.validation, splits.validation, objective)
        check_memory(config, accelerator, objective)

    resumed = None if state is None else assets
    objective = build_objective(
        config, device=accelerator.device, assets=resumed, data=splits.training, preflight=preflight
    )
    apply_memory_options(config, accelerator, objective)
    trainer = Trainer(config, accelerator, objective, held_out=splits.validation, data_digest=splits.digest)
    return trainer, splits


class Trainer:
    """The loop over the steps of one run, and its state.

    Attributes:
        objective: the networks and their loss.
        trainable: its parameters that require gradients, by name.
        ema: their exponential moving average; empty without `ema_decay`.
        step: optimizer steps done.
        metrics: their losses, as they are logged.
    """

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        objective: Objective,
        *,
        held_out: CaptionedDataset | None = None,
        data_digest: str | None = None,
    ) -> None:
        self._data_digest = data_digest
        self.config = config
        self.accelerator = accelerator
        self.objective = objective
        # Before the optimizer is built, which may hold views of the weights.
        objective.to(accelerator.device)
        objective.to(memory_format=memory_format_for(objective, accelerator.device))
        self.step = 0
        if config.compile:
            compile_networks(objective)
        text, offload = text_parameters(objective), config.memory.offload_optimizer
        optimizer = build_optimizer(objective, config.optimizer, text, offload=offload)
        self._offloaded = optimizer if isinstance(optimizer, OffloadedGradients) else None
        self._model: nn.Module
        self._optimizer: torch.optim.Optimizer
        self._model, self._optimizer = accelerator.prepare(
            wrap_for_sharding(accelerator, objective), optimizer
        )
        self._rates = [group["lr"] for group in self._optimizer.param_groups]
        # After FSDP, which replaces them by shards.
        self.trainable = {name: p for name, p in objective.named_parameters() if p.requires_grad}
        averaged = self.trainable if config.ema_decay else {}
        average_device = "cpu" if config.memory.ema_device == "cpu" else accelerator.device
        self.ema = {name: p.detach().to(average_device, copy=True) for name, p in averaged.items()}
        self.metrics = Metrics(config, accelerator)
        self._validator: Validator | None = None
        if config.validation is not None:
            self._validator = Validator(config, accelerator, objective, self.ema, held_out, self.metrics)

    def restore(self, state: RunState) -> None:
        """Load the state of a checkpoint.

        Raises:
            ResumeError: it has other parameters than this run.
        """
        _copy_into(self.trainable, state.weights)
        _copy_into(self.ema, state.ema)
        restore_optimizer(self._optimizer, state.optimizer)
        if self.accelerator.scaler is not None and state.scaler:  # a checkpoint without fp16 has none
            self.accelerator.scaler.load_state_dict(dict(state.scaler))
        self.metrics.restore(state.unfinished_row)
        self.step = state.step

    def run(self) -> None:
        """Train to the last step of the recipe, with checkpoints during the run and at the end.

        Raises:
            NumericalError: the loss or the weights are not finite.
            OutputError: a checkpoint could not be written.
            LostProcessError: a data-loading worker died.
            SystemExit: 128 + the signal's number, after a checkpoint, on SIGTERM or Ctrl-C.
        """
        config = self.config
        release_freed_memory()
        self._model.train()
        bar = tqdm(
            range(self.step, config.max_steps),
            initial=self.step,
            total=config.max_steps,
            desc=config.task.kind,
            disable=not self.accelerator.is_main_process,
            mininterval=1.0 if sys.stderr.isatty() else 30.0,
        )
        with catch_stop_signal() as stop, bar, self._batches() as batches:
            if self._validator is not None:
                self._validator.start(self.step)
            for step in bar:
                self.metrics.add(*self._update(step, batches))
                self.step = step + 1
                signal = agree_on_signal(self.accelerator, stop.number)
                if self.metrics.is_row_due(self.step):
                    self.metrics.write_row(self.step, config.optimizer.rate_at(step, config.max_steps))
                if signal or self.step == config.max_steps or self.step % config.checkpoint_every == 0:
                    self._save_checkpoint()
                if signal:
                    raise SystemExit(128 + signal)
                if self._validator is not None:
                    self._validator.after_step(self.step)
                bar.set_postfix(self.metrics.progress, refresh=False)

    def save_model(self, folder: Path, *, images: int) -> None:
        """Write the finished model, from the moving average if there is one; training cannot continue afterwards.

        All processes must call; the main one writes. The new `folder` appears complete or not at all; its card says
        that there were `images` training images.

        Raises:
            OutputError: a file could not be written.
        """
        parameters, is_main = self.trained_parameters, self.accelerator.is_main_process
        unshard_module(self.objective, keep=is_main)
        ema = full_tensors(self.ema, keep=is_main)
        if is_main:
            weights = {**self.objective.cpu().state_dict(), **ema}
            with atomic_folder(folder, replace=True) as written:
                self.objective.save(written, weights)
                counts = {"images": images, "parameters": parameters, "steps": self.step}
                write_card(written, self.config, pipeline=self.objective.pipeline(), **counts)

    def _batches(self) -> AbstractContextManager[Iterator[PlannedBatch]]:
        """This process's batches of the remaining steps, one per accumulated part."""
        config, accelerator = self.config, self.accelerator
        steps = (
            plan_step(
                config.seed,
                step,
                batch_size=config.batch_size,
                order=self.objective.order,
                parts=config.gradient_accumulation_steps,
                rank=accelerator.process_index,
                processes=accelerator.num_processes,
            )
            for step in range(self.step, config.max_steps)
        )
        plans = chain.from_iterable(steps)
        if not config.workers:
            return nullcontext((plan, self.objective.batch(plan)) for plan in plans)
        pin_memory = accelerator.device.type == "cuda"
        return load_batches(self.objective, plans, workers=config.workers, pin_memory=pin_memory)

    @property
    def trained_parameters(self) -> int:
        """The number of trainable weights."""
        return sum(parameter.numel() for parameter in self.trainable.values())

    def try_steps(self, *, count: int, seconds: float) -> list[float]:
        """Compute a warm-up step, and then at most `count` within about `seconds`; returns the seconds of each.

        This changes the weights, so this trainer can no longer be used for a run.
        """
        self._model.train()
        taken: list[float] = []
        with self._batches() as batches:
            for step in range(min(count + 1, self.config.max_steps)):
                start = time.monotonic()
                losses, _ = self._update(step, batches)
                float(losses["loss"])  # waits for the device
                taken.append(time.monotonic() - start)
                if sum(taken[1:]) > seconds:
                    break
        return taken[1:] or taken

    def _update(
        self, step: int, batches: Iterator[PlannedBatch]
    ) -> tuple[dict[str, Tensor], dict[str, Subset]]:
        """The training step: one optimizer step over the global batch, in accumulated parts.

        Returns:
            On the device and of this process, losses by name as means over its samples; and losses over subsets of its
            samples, which may be empty, as sums with their count.
        """
        config, accelerator = self.config, self.accelerator
        losses: dict[str, Tensor] = {}
        subsets: dict[str, Subset] = {}

        # Set the learning rate of each group: its own, times the schedule's factor.
        factor = config.optimizer.factor_at(step, config.max_steps)
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor

        parts = config.gradient_accumulation_steps
        for plan, batch in islice(batches, parts):
            # Accelerate exchanges gradients between processes, and lets the optimizer step, in the last part only.
            with accelerator.accumulate(self._model):
                # Compute the mean loss of the part, and its gradients, scaled by 1 / parts.
                loss = self._loss(plan, batch)
                accelerator.backward(loss.total)

                # Sum up the losses for the log, without waiting for the device.
                for name, value in {"loss": loss.total, **loss.parts}.items():
                    losses[name] = losses.get(name, 0) + value.detach() / parts
                for name, (total, count) in loss.subsets.items():
                    before = subsets.get(name, Subset(torch.zeros_like(total), torch.zeros_like(count)))
                    subsets[name] = Subset(before.total + total.detach(), before.count + count)

                # Clip the gradients by their global norm and update the weights.
                max_norm = config.optimizer.max_grad_norm
                if accelerator.sync_gradients and max_norm is not None:
                    losses["grad_norm"] = self._clip_gradients(max_norm)
                self._optimizer.step()
                self._optimizer.zero_grad()

        # Move the average towards the weights, faster at first, so that it forgets the initialization:
        #     average = decay * average + (1 - decay) * weights
        decay = min(config.ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, average in self.ema.items():
                average.lerp_(self.trainable[name].to(average.device), 1 - decay)
        return losses, subsets

    def _loss(self, plan: BatchIndices, batch: tuple[Tensor, ...]) -> Loss:
        """The loss of one part of the batch, which depends only on the weights, the plan and the batch."""
        batch = tuple(tensor.to(self.accelerator.device, non_blocking=True) for tensor in batch)
        # Dropout draws from the global generator; seeded here, it draws the same in a resumed run.
        torch.manual_seed(sample_rng(plan.seed, "network", plan.step, plan.samples[0]).getrandbits(63))
        return self._model(*batch)

    def _clip_gradients(self, max_norm: float) -> Tensor:
        """Scale the gradients down to `max_norm` if their norm is higher; returns their norm before."""
        if self._offloaded is not None:
            return self._offloaded.clip_grad_norm(max_norm)
        norm: Any = self.accelerator.clip_grad_norm_(self.trainable.values(), max_norm)
        return full_tensor(norm).detach()  # FSDP's is sharded

    def _save_checkpoint(self) -> None:
        for name, parameter in self.trainable.items():
            if not full_tensor(parameter.isfinite().all()):
                raise NumericalError(f"{name} is not finite after step {self.step}; {NAN_ADVICE}")
        is_main = self.accelerator.is_main_process
        unfinished_row = self.metrics.unfinished_row(self.step)
        weights = full_tensors({name: p.detach() for name, p in self.trainable.items()}, keep=is_main)
        ema = full_tensors(self.ema, keep=is_main)
        optimizer = full_tensors(flatten_optimizer(self._optimizer), keep=is_main)
        if is_main:
            self.metrics.sync()
            scaler = self.accelerator.scaler
            state = RunState(
                step=self.step,
                config=self.config.model_dump(mode="json"),
                weights=weights,
                ema=ema,
                optimizer=optimizer,
                scaler={} if scaler is None else scaler.state_dict(),
                processes=self.accelerator.num_processes,
                unfinished_row=unfinished_row,
                data_digest=self._data_digest,
            )
            save_checkpoint(self.config.output_dir, state, keep=self.config.keep_checkpoints)
        self.accelerator.wait_for_everyone()


def _copy_into(targets: Mapping[str, Tensor], sources: Mapping[str, Tensor]) -> None:
    ours, theirs = ({name: tensor.shape for name, tensor in side.items()} for side in (targets, sources))
    if differing := dict(ours.items() ^ theirs.items()):
        raise ResumeError(
            f"the checkpoint and this run differ in {len(differing)} parameters or their shapes: "
            f"{first_five(sorted(differing))}; undo the change of networks, or start a new run in another output_dir"
        )
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(shard_like(target, sources[name]))
