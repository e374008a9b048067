"""The `optimizer` and `memory` sections of a recipe."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from latentgen.models.activation_checkpointing import Checkpointing
from latentgen.models.config import StorageDtype
from latentgen.train.config.base import Decay, Positive, Rate, Section


class Optimizer(Section):
    """The optimizer and its learning rate, which rises over `warmup_steps` and then follows `schedule`.

    `warmup_stable_decay` (arXiv:2404.06395, section 4) stays constant, and falls linearly to zero over the last
    `decay_fraction` of the run; its first step has 1 / `warmup_steps` of the rate. `constant_with_warmup`, `linear` and
    `cosine` equal diffusers' at every step: there the first step of a warm-up has a rate of zero.

    Trained text encoders have the same rate, or `text_encoder_learning_rate`, with the same schedule.

    `betas` are AdamW's; muon uses them for parameters that are not weight matrices. `adamw8bit` is bitsandbytes' AdamW
    with a quarter of the state. `adafactor` has almost no state; its learning rate is relative to each weight's size
    (1e-3 to 1e-2 is usual).

    `step_in_backward` updates each weight as soon as its gradient is computed, and frees the gradient. So gradients
    cannot be accumulated, or clipped by norm: it needs `max_grad_norm: null`.
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
    def _agrees(self) -> Self:
        if self.step_in_backward and self.name not in ("adamw", "adafactor"):
            raise ValueError(f"step_in_backward is for adamw and adafactor; name is {self.name}")
        if self.step_in_backward and self.max_grad_norm is not None:
            raise ValueError(f"step_in_backward: set max_grad_norm to null; it is {self.max_grad_norm:g}")
        if self.decay_fraction and self.schedule != "warmup_stable_decay":
            raise ValueError(f"decay_fraction is for warmup_stable_decay; schedule is {self.schedule}")
        return self

    def unreached(self, max_steps: int) -> str | None:
        """A warning if a run of `max_steps` ends before its warm-up, so that the rate stays below its maximum."""
        if self.warmup_steps < max_steps or self.warmup_steps <= 1:
            return None
        most = self.rate_at(max_steps - 1, max_steps)
        return (
            f"optimizer.warmup_steps is {self.warmup_steps:,} and max_steps {max_steps:,}: the learning rate rises to "
            f"only {most:.3g} of {self.learning_rate:.3g}; lower optimizer.warmup_steps"
        )

    def rate_at(self, step: int, max_steps: int) -> float:
        """The learning rate at step `step`, counted from 0."""
        return self.learning_rate * self.factor_at(step, max_steps)

    def factor_at(self, step: int, max_steps: int) -> float:
        """The factor in 0..1 that scales the learning rate at step `step`, counted from 0."""
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
    """Options that save memory.

    `gradient_checkpointing` recomputes activations in the backward pass instead of saving them: exact, for about a
    third more time; with `selective` only those that are cheap to recompute, for a tenth more. `ema_device: cpu` puts
    the moving average into host memory: exact. `offload_optimizer` puts gradients and AdamW's moments into host memory,
    and loads them one parameter at a time: exact, on CUDA, for adamw and adafactor, in one process and not in fp16.
    `base_dtype` is the dtype in which frozen weights are stored; computations are in the run's precision. The
    `planner` estimates the memory of a step and prints it before the first step; a step that does not fit is an error.
    """

    gradient_checkpointing: Checkpointing = False
    ema_device: Literal["same", "cpu"] = "same"
    offload_optimizer: bool = False
    base_dtype: StorageDtype = "fp32"
    planner: bool = True
