"""What looks at a run while it goes on: images of fixed prompts, and the loss on held-out images."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager

import torch
from accelerate import Accelerator
from torch import Tensor

from latentgen.train.config import TrainConfig, Validation
from latentgen.train.data import BatchPlan, CaptionedImages, Order, sample_rng
from latentgen.train.objectives.base import Objective
from latentgen.train.objectives.standing_in import standing_in
from latentgen.train.run_log import RunLog
from latentgen.train.samples import Example, draw_prompts, remake, samples_folder, save_rows


class Watch:
    """The validation of one run. It changes nothing of the training: see `standing_in`.

    It looks at the moving average of the weights if there is one, as the finished model is made of it. The main process
    works, the others wait; all must call the methods.

    Args:
        config: the recipe.
        accelerator: where it runs.
        objective: what is trained.
        ema: the moving average, by the names of the parameters.
        held_out: the images to measure the loss on, if it is to be measured.
        log: where to tell it.

    Raises:
        ConfigError: the task cannot do what the recipe asks for.
    """

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        objective: Objective,
        ema: Mapping[str, Tensor],
        held_out: CaptionedImages | None,
        log: RunLog,
    ) -> None:
        self._config = config
        self._validation = config.validation
        self._accelerator = accelerator
        self._objective = objective
        self._ema = ema
        self._log = log
        self._measured: Objective | None = None
        self._examples: list[Example] = []
        if config.validation is None:
            return
        if held_out is not None:
            self._measured = objective.over(held_out, config.validation.seed)
        if not accelerator.is_main_process:
            return
        if held_out is not None:
            self._examples = _examples(objective, held_out, config.validation)

    def begin(self, step: int) -> None:
        """Do what is due before the first step, or what a run that was stopped after `step` had left to do."""
        validation = self._validation
        if validation is not None and self._accelerator.is_main_process:
            drawn = samples_folder(self._config.output_dir, step).is_dir()
            if self._draws(validation, step) and not drawn:
                self._draw(validation, step)
            if self._measures(validation, step) and not self._log.has_validation(step):
                self._measure(validation, step)
        self._accelerator.wait_for_everyone()

    def after(self, step: int) -> None:
        """Do what is due after a step."""
        validation = self._validation
        if validation is None:
            return
        start = time.monotonic()
        draws, measures = self._draws(validation, step), self._measures(validation, step)
        if self._accelerator.is_main_process:
            if draws:
                self._draw(validation, step)
            if measures:
                self._measure(validation, step)
        if draws or measures:
            self._accelerator.wait_for_everyone()
            self._log.leave_out(time.monotonic() - start)

    def _draws(self, validation: Validation, step: int) -> bool:
        due = self._is_due(step, validation.every) if step else validation.at_start
        return due and bool(validation.prompts or self._examples)

    def _measures(self, validation: Validation, step: int) -> bool:
        due = self._is_due(step, validation.loss_every) if step else validation.at_start
        return due and self._config.measures

    def _is_due(self, step: int, every: int) -> bool:
        return step % every == 0 or step == self._config.max_steps

    def _draw(self, validation: Validation, step: int) -> None:
        folder = samples_folder(self._config.output_dir, step)
        with self._objective.preview(self._ema) as pipeline:
            rows = draw_prompts(pipeline, validation, step, self._precision) if validation.prompts else []
            rows += remake(pipeline, self._examples, validation, step, self._precision)
        save_rows(folder, rows)
        self._log.write_images(step, [[sample.image for sample in row] for row in rows])

    @torch.no_grad()
    def _measure(self, validation: Validation, step: int) -> None:
        objective = self._measured
        if objective is None:
            return
        sums: dict[str, float] = {}
        with standing_in(objective, self._ema), self._precision():
            for plan in _plans(validation.seed, objective.order, self._samples_at_once()):
                loss = objective.held_out_loss(plan, validation.timesteps)
                share = len(plan.samples) / len(objective.order)
                for name, value in {"loss": loss.total, **loss.parts}.items():
                    sums[name] = sums.get(name, 0.0) + share * float(value)
        self._log.write_validation(step, sums.pop("loss"), sums)

    def _precision(self) -> AbstractContextManager[None]:
        """That in which the networks are trained."""
        return self._accelerator.autocast()

    def _samples_at_once(self) -> int:
        """As many as training computes at once."""
        config = self._config
        return config.batch_size // (config.gradient_accumulation_steps * self._accelerator.num_processes)


def _examples(objective: Objective, held_out: CaptionedImages, validation: Validation) -> list[Example]:
    """The first held-out images, as many as are to be made again."""
    examples = []
    for item in range(min(validation.images, len(held_out))):
        rng = sample_rng(validation.seed, "example", item)
        view = held_out.view(item, rng)
        examples.append(objective.example(view, rng))
    return examples


def _plans(seed: int, order: Order, at_once: int) -> Iterator[BatchPlan]:
    """All items, each once, as samples of one step."""
    for items in order.parts(at_once):
        yield BatchPlan(seed, 0, len(order), items, items)
