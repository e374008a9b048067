"""What a call asks for, checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from latentgen.diffusion.schedule import NoiseLevel
from latentgen.diffusion.scheduler import Scheduler
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
