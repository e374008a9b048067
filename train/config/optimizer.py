"""The `optimizer` and `memory` sections of a recipe."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from latentgen.models.activation_checkpointing import Checkpointing
from latentgen.models.config import StorageDtype
from latentgen.train.config.base import Decay, Positive, Rate, Section


class Optimizer(Section):
    """The optimiser and its learning rate, which rises over `warmup_steps` and then goes as `schedule` says.

    `warmup_stable_decay` (arXiv:2404.06395, section 4) stays, and falls linearly to zero over the share
    `decay_fraction` of the run, at its end; its first step has 1 / `warmup_steps` of the rate. `constant_with_warmup`,
    `linear` and `cosine` are diffusers' to the step: there the first step of a warm-up has a rate of zero.

    Text encoders that learn have the same rate, or `text_encoder_learning_rate`, with the same schedule.

    `betas` are AdamW's; muon uses them for what is no weight matrix. `adamw8bit` is AdamW with a quarter of the state,
    by bitsandbytes. `adafactor` keeps almost none; its learning rate is a share of each weight's size (1e-3 to 1e-2 is
    usual).

    `step_in_backward` changes each weight as soon as its gradient is there, which is then dropped: the gradients never
    lie in memory together. So they cannot be accumulated, nor clipped by their norm: it needs `max_grad_norm: null`.
    """

    name: Literal["adamw", "adamw8bit", "adafactor", "muon"] = "adamw"
    learning_rate: Positive = 1e-4
    text_encoder_learning_rate: Annotated[float, Field(ge=0, le=1e6)] | None = None
    schedule: Literal["warmup_stable_decay", "constant_with_warmup", "linear", "cosine"] = (
        "warmup_stable_decay"
    )
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    weight_decay: Rate = 0.01
    warmup_steps: Annotated[int, Field(ge=0, le=10**9)] = 100
    decay_fraction: Rate = 0.0
    max_grad_norm: Positive | None = 1.0
    step_in_backward: bool = False

    @model_validator(mode="after")
    def _can_step_in_backward(self) -> Self:
        if self.step_in_backward and self.name not in ("adamw", "adafactor"):
            raise ValueError(f"step_in_backward is for adamw and adafactor; name is {self.name}")
        if self.step_in_backward and self.max_grad_norm is not None:
            raise ValueError(
                f"step_in_backward: no gradient waits for the others, so their norm is never known; max_grad_norm is "
                f"{self.max_grad_norm:g} and must be null"
            )
        return self

    @model_validator(mode="after")
    def _can_decay(self) -> Self:
        if self.decay_fraction and self.schedule != "warmup_stable_decay":
            raise ValueError(
                f"decay_fraction belongs to schedule warmup_stable_decay, and schedule is {self.schedule}; leave one "
                "of them out"
            )
        return self

    def unreached(self, max_steps: int) -> str | None:
        """What to tell of a warm-up that ends no sooner than a run of so many steps, so that the rate stays below."""
        if self.warmup_steps < max_steps or self.warmup_steps <= 1:
            return None
        most = self.rate_at(max_steps - 1, max_steps)
        return (
            f"optimizer.warmup_steps is {self.warmup_steps:,} and max_steps {max_steps:,}: the learning rate rises to "
            f"{most:.3g} at most, in the last step, of {self.learning_rate:.3g}; lower optimizer.warmup_steps for a "
            "run as short as this"
        )

    def rate_at(self, step: int, max_steps: int) -> float:
        """The learning rate of step `step`, the first of which is 0."""
        return self.learning_rate * self.factor_at(step, max_steps)

    def factor_at(self, step: int, max_steps: int) -> float:
        """The share, in 0..1, of its learning rate that step `step` has, the first of which is 0."""
        if self.schedule == "warmup_stable_decay":
            warmup = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
            left = (max_steps - step) / max_steps
            decay = min(1.0, left / self.decay_fraction) if self.decay_fraction else 1.0
            return min(warmup, decay)
        if step < self.warmup_steps:
            return step / self.warmup_steps
        if self.schedule == "constant_with_warmup":
            return 1.0
        progress = (step - self.warmup_steps) / (max_steps - self.warmup_steps)
        return 1 - progress if self.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2


class Memory(Section):
    """What a run may trade for memory.

    `gradient_checkpointing` computes activations once more in the backward pass instead of keeping them: exact, for
    about a third more time; with `selective` only what takes little, for a tenth more. `ema_device: cpu` keeps the
    moving average in the memory of the host: exact. With `offload_optimizer` gradients and AdamW's moments are on the
    device one at a time, and wait in the memory of the host, or, beside a CPU, in files on the disk of the run: exact,
    for adamw and adafactor, in one process and not in fp16. `base_dtype` is what the weights that are not trained are
    stored in; they are computed with in the precision of the run. With `planner` the needs of a step are estimated
    before the first, shown, and refused if they do not fit.
    """

    gradient_checkpointing: Checkpointing = False
    ema_device: Literal["same", "cpu"] = "same"
    offload_optimizer: bool = False
    base_dtype: StorageDtype = "fp32"
    planner: bool = True
