"""The section of a recipe that says how the weights follow the gradients."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from latentgen.train.config.base import Decay, Positive, Rate, Section


class Optimizer(Section):
    """The optimiser and its learning rate: a linear warm-up, a plateau, and a linear end.

    `decay_fraction` is the share of the run, at its end, in which the rate falls to zero. `betas` are AdamW's; muon
    uses them for what is no weight matrix.
    """

    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: Positive = 1e-4
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    weight_decay: Rate = 0.01
    warmup_steps: Annotated[int, Field(ge=0, le=10**9)] = 100
    decay_fraction: Rate = 0.0
    max_grad_norm: Positive = 1.0

    def rate_at(self, step: int, max_steps: int) -> float:
        """The learning rate of step `step`, the first of which is 0."""
        warmup = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        left = (max_steps - step) / max_steps
        decay = min(1.0, left / self.decay_fraction) if self.decay_fraction else 1.0
        return self.learning_rate * min(warmup, decay)
