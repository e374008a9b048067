"""What a call asks for, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from latentgen.diffusion.schedule import NoiseLevel
from latentgen.diffusion.scheduler import Scheduler
from latentgen.errors import InputError
from latentgen.pipelines.arguments import check_share
from latentgen.pipelines.conditioning import Row


@dataclass(frozen=True)
class Request:
    """The images that are to be made, one entry for each.

    Attributes:
        prompts: what they show.
        negatives: what guidance leads away from.
        clip_skip: how many more layers of the text encoder the prompts go without.
        seeds: of their noise.
        guidance_scale: of classifier-free guidance.
    """

    prompts: tuple[Row, ...]
    negatives: tuple[Row, ...]
    clip_skip: int
    seeds: tuple[int, ...]
    guidance_scale: float

    def __len__(self) -> int:
        return len(self.prompts)


class Sampling(NamedTuple):
    """How a run is sampled.

    Attributes:
        scheduler: what takes the steps.
        levels: the noise levels of the whole run, and that at which it ends.
        steps: the part of the steps over `levels` that is taken.
    """

    scheduler: Scheduler
    levels: tuple[NoiseLevel, ...]
    steps: range

    @property
    def total(self) -> int:
        """How many steps the whole run has."""
        return len(self.levels) - 1

    def initial(self, noise: Tensor) -> Tensor:
        """The latents that begin a whole run, from standard normal noise of the same shape."""
        return self.scheduler.initial(noise, self.levels)

    @property
    def is_from_noise(self) -> bool:
        """Whether the run begins at its first level, where it knows of nothing but noise."""
        return self.steps.start == 0

    def noised(self, x0: Tensor, noise: Tensor) -> Tensor:
        """Clean latents at the level where these steps begin; the noise is standard normal, of the same shape."""
        level = self.levels[self.steps.start]
        return level.alpha * x0 + level.sigma * noise

    def with_strength(self, strength: float) -> Sampling:
        """The last steps of the whole run, `strength` of them rounded down as in diffusers; none at strength 0.

        Raises:
            InputError: not a number from 0 to 1, or one above 0 that leaves no step.
        """
        count = int(self.total * check_share("strength", strength))
        if count == 0 and strength > 0:
            raise InputError(
                f"strength={strength} leaves none of the {self.total} steps; use {math.ceil(1000 / self.total) / 1000} "
                "or more, or more steps"
            )
        return self._replace(steps=range(self.total - count, self.total))
