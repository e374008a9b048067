"""The section of a recipe that says how the error of a prediction is measured, and what noise is predicted."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from latentgen.train.config.base import Positive, Rate, Section

ErrorKind = Literal["l2", "huber", "smooth_l1"]


class MinSNR(Section):
    """Weights that are clamped at the signal-to-noise ratio `gamma` (arXiv:2303.09556)."""

    kind: Literal["min_snr"]
    gamma: Positive = 5.0


class Debiased(Section):
    """Weights that remove the bias of the predicted x0 (arXiv:2310.08442)."""

    kind: Literal["debiased"]


class P2(Section):
    """Weights that prefer the levels at which content is made (arXiv:2204.00227)."""

    kind: Literal["p2"]
    gamma: Positive = 1.0
    k: Positive = 1.0


class PyramidNoise(Section):
    """Noise of lower resolutions on top of the usual, each `discount` times as strong as that before."""

    iterations: Annotated[int, Field(ge=1, le=16)] = 6
    discount: Rate = 0.4


Weighting = Annotated[
    Annotated[MinSNR | Debiased | P2, Field(discriminator="kind")] | None,
    BeforeValidator(lambda value: None if value == "none" else value),
]


class LatentLoss(Section):
    """What the tasks of diffusion may change about their loss; left out, it is the plain mean squared error.

    `kind` is what is averaged: the squared error, or what grows more slowly beyond `huber_c` (arXiv:2403.16728).
    `weighting` makes some noise levels count more than others. With `zero_terminal_snr` the schedule is rescaled so
    that its last timestep is pure noise (arXiv:2305.08891), and the finished model is sampled so.

    `offset_noise` shifts the noise of each channel as a whole (strengths of 0.03 to 0.1 are usual), `pyramid_noise`
    adds coarser noise: both let a model learn brightness and large shapes. `input_perturbation` noises what the UNet
    sees a little more than it is told (arXiv:2301.11706; 0.1 is usual). `masked` weighs the error by the images'
    masks.
    """

    kind: ErrorKind = "l2"
    huber_c: Positive = 0.1
    weighting: Weighting = None
    zero_terminal_snr: bool = False
    offset_noise: Rate = 0.0
    pyramid_noise: PyramidNoise | None = None
    input_perturbation: Rate = 0.0
    masked: bool = False

    @model_validator(mode="after")
    def _uses_huber_c(self) -> Self:
        if self.kind == "l2" and self.huber_c != LatentLoss.model_fields["huber_c"].default:
            raise ValueError("huber_c is for kind huber and smooth_l1; the kind is l2: leave it out")
        return self
