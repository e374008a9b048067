"""The section of a recipe that says how a run is watched."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from latentgen.prompts import check_prompts
from latentgen.train.config.base import Count, Section
from latentgen.train.config.data import Data

Side = Annotated[int, Field(ge=8, le=16384)]


class Validation(Section):
    """Images of fixed prompts, and the loss on images that are not learnt from; neither changes what is learnt.

    Every `every` steps each of `prompts` is drawn `images_per_prompt` times, from the seeds `seed`, `seed` + 1 and so
    on, into `samples/` of the run's folder. `height` and `width` are by default the size that the model was made for,
    `guidance_scale` is its own. `at_start` does this, and what follows, before the first step, too.

    For models that make images out of images, as many `images` of those that the loss is measured on are made again: a
    row shows what the model is shown, what it makes of it, and the truth. A model of inpainting is shown a random mask
    of each, one that follows instructions the image before the edit, with the caption as the instruction.

    Every `loss_every` steps the loss is measured on the first `loss_images` images of `data`, or of the recipe's
    `validation_fraction`: the plain mean squared error at `timesteps` timesteps, the middles of as many equal parts of
    the schedule, with noise that depends on `seed` alone. So it can be compared between runs.
    """

    prompts: tuple[str, ...] = ()
    images: Annotated[int, Field(ge=0, le=64)] = 0
    negative_prompt: str = ""
    every: Count = 500
    at_start: bool = False
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    images_per_prompt: Annotated[int, Field(ge=1, le=64)] = 1
    num_inference_steps: Annotated[int, Field(ge=1, le=1000)] = 25
    guidance_scale: Annotated[float, Field(ge=0, le=1e6)] | None = None
    height: Side | None = None
    width: Side | None = None
    data: Data | None = None
    loss_every: Count = 500
    loss_images: Annotated[int, Field(ge=1, le=65536)] = 64
    timesteps: Annotated[int, Field(ge=1, le=1000)] = 4

    @model_validator(mode="after")
    def _prompts_are_text(self) -> Self:
        check_prompts((*self.prompts, self.negative_prompt))
        return self
