"""The one training loop: Accelerate does precision and distribution, an objective does the learning."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from filelock import FileLock, Timeout
from torch import Tensor, nn
from tqdm import tqdm

from latentgen.errors import NumericalError, ResumeError, RunLockedError
from latentgen.train.autoencoder import AutoencoderObjective
from latentgen.train.checkpoint import (
    RunState,
    flatten_optimizer,
    load_latest,
    restore_optimizer,
    save_checkpoint,
)
from latentgen.train.config import FREE_FIELDS, AutoencoderTask, Optimizer, TrainConfig
from latentgen.train.data import open_data, plan_step
from latentgen.train.objective import Objective
from latentgen.train.optimizer import MuonAdamW


class Trainer:
    """One run of a recipe, from its start or its latest checkpoint to the finished model in `output_dir/model`."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            step_scheduler_with_optimizer=False,
        )
        torch.manual_seed(config.seed)
        # Before the optimiser is built, which may hold views of the weights.
        self.objective = build_objective(config).to(
            self.accelerator.device, memory_format=torch.channels_last
        )
        self.optimizer = build_optimizer(self.objective, config.optimizer)
        self.trainable = {name: p for name, p in self.objective.named_parameters() if p.requires_grad}
        self.ema = (
            {name: p.detach().clone() for name, p in self.trainable.items()} if config.ema_decay else {}
        )
        self.step = 0
        self._signal: int | None = None

    def run(self) -> Path:
        """Train to the last step; returns the folder of the finished model.

        Raises:
            ResumeError: the run exists and resume is off, or the checkpoint was made with another recipe.
            RunLockedError: another process writes into the same folder.
            NumericalError: the loss is not finite.
        """
        with run_lock(self.config.output_dir, enabled=self.accelerator.is_main_process):
            self._resume_or_start()
            model, optimizer = self.accelerator.prepare(self.objective, self.optimizer)
            with self._finishing_the_step():
                self._loop(model, optimizer)
            self.accelerator.wait_for_everyone()
            folder = self.config.output_dir / "model"
            if self.accelerator.is_main_process:
                self.objective.cpu().save(folder, {**self.objective.state_dict(), **self.ema})
        return folder

    def _loop(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        config = self.config
        model.train()
        steps = range(self.step, config.max_steps)
        bar = tqdm(
            steps,
            initial=self.step,
            total=config.max_steps,
            desc=config.task.kind,
            disable=not self.accelerator.is_main_process,
            mininterval=1.0,
        )
        for step in bar:
            parts = self._update(model, optimizer, step)
            self.step = step + 1
            if self.step % config.log_every == 0 or self.step == config.max_steps:
                self._report(bar, parts)
            stopping = self._signal is not None
            if stopping or self.step % config.checkpoint_every == 0 or self.step == config.max_steps:
                self._checkpoint()
            if stopping:
                bar.close()
                raise SystemExit(128 + (self._signal or 0))

    @contextmanager
    def _finishing_the_step(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C end the run after the step at hand, with a checkpoint; a second one ends it at once."""

        def remember(number: int, frame: FrameType | None) -> None:
            self._signal = number
            for handled, handler in before.items():
                signal.signal(handled, handler)

        before = {number: signal.signal(number, remember) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _update(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> dict[str, Tensor]:
        """One optimiser step over the global batch; returns the mean of each part of the loss, undetermined."""
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
        parts: dict[str, Tensor] = {}
        for plan in plans:
            with self.accelerator.accumulate(model):
                batch = (tensor.to(self.accelerator.device) for tensor in self.objective.batch(plan))
                loss = model(*batch)
                self.accelerator.backward(loss.total)
                for name, value in {"loss": loss.total, **loss.parts}.items():
                    parts[name] = parts.get(name, 0) + value.detach() / len(plans)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.trainable.values(), config.optimizer.max_grad_norm)
                for group in optimizer.param_groups:
                    group["lr"] = config.optimizer.rate_at(step, config.max_steps)
                optimizer.step()
                optimizer.zero_grad()
        self._update_ema(step)
        return parts

    @torch.no_grad()
    def _update_ema(self, step: int) -> None:
        """Move the average towards the weights, faster at first so that it forgets the initialisation."""
        decay = min(self.config.ema_decay, (1 + step) / (10 + step))
        for name, average in self.ema.items():
            average.lerp_(self.trainable[name].to(average.device), 1 - decay)

    def _report(self, bar: tqdm[int], parts: Mapping[str, Tensor]) -> None:
        values = {name: self.accelerator.reduce(value, "mean").item() for name, value in parts.items()}
        if not all(map(math.isfinite, values.values())):
            raise NumericalError(
                f"the loss is not finite at step {self.step}: {values}; lower optimizer.learning_rate, or train "
                "with mixed_precision bf16 or no; the last checkpoint is intact"
            )
        bar.set_postfix({name: f"{value:.4g}" for name, value in values.items()}, refresh=False)
        if self.accelerator.is_main_process:
            with (self.config.output_dir / "log.jsonl").open("a", encoding="utf-8") as log:
                log.write(json.dumps({"step": self.step, **values}) + "\n")

    def _checkpoint(self) -> None:
        if self.accelerator.is_main_process:
            state = RunState(
                step=self.step,
                config=self.config.model_dump(mode="json"),
                weights={name: p.detach() for name, p in self.trainable.items()},
                ema=self.ema,
                optimizer=flatten_optimizer(self.optimizer),
            )
            save_checkpoint(self.config.output_dir, state, keep=self.config.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def _resume_or_start(self) -> None:
        """Take up the latest checkpoint if asked to; never start over a run that has one, or resume another recipe."""
        output_dir = self.config.output_dir
        if not self.config.resume:
            if any(output_dir.glob("checkpoint-*")):
                raise ResumeError(
                    f"{output_dir} holds a run already: add --set resume=true, or choose another output_dir"
                )
            return
        state = load_latest(output_dir)
        _check_same_recipe(state.config, self.config.model_dump(mode="json"))
        for name, parameter in self.trainable.items():
            parameter.data.copy_(state.weights[name])
        for name, average in self.ema.items():
            average.copy_(state.ema[name])
        restore_optimizer(self.optimizer, state.optimizer)
        self.step = state.step


def build_objective(config: TrainConfig) -> Objective:
    """The objective of a recipe, its networks initialised at random or from `init_from`."""
    data = open_data(config.data)
    if isinstance(config.task, AutoencoderTask):
        return AutoencoderObjective(config.task, data)
    from latentgen.train.text_to_image import TextToImageObjective

    return TextToImageObjective(config.task, data, seed=config.seed)


def build_optimizer(module: nn.Module, config: Optimizer) -> torch.optim.Optimizer:
    """The optimiser of a recipe over the parameters that require gradients."""
    if config.name == "muon":
        return MuonAdamW(
            module, learning_rate=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay
        )
    return torch.optim.AdamW(
        [p for p in module.parameters() if p.requires_grad],
        lr=config.learning_rate,
        betas=config.betas,
        weight_decay=config.weight_decay,
        fused=True,
    )


@contextmanager
def run_lock(output_dir: Path, *, enabled: bool) -> Iterator[None]:
    """Hold the run folder: a lock of the operating system, which ends with the process however it ends.

    Raises:
        RunLockedError: another process holds it.
    """
    if not enabled:
        yield
        return
    output_dir.mkdir(parents=True, exist_ok=True)
    lock = FileLock(output_dir / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise RunLockedError(
            f"another process trains in {output_dir}; wait for it, or choose another output_dir"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _check_same_recipe(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    fields = sorted((before.keys() | now.keys()) - FREE_FIELDS)
    changed = [
        f"{field} was {before.get(field)}, is {now.get(field)}"
        for field in fields
        if before.get(field) != now.get(field)
    ]
    if changed:
        raise ResumeError(f"the recipe is not the one that the run began with: {'; '.join(changed)}")
