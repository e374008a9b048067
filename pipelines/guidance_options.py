"""How a call guides, beyond the scale: options, and the guidance that they make."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from latentgen.diffusion.guidance import (
    CFGPlusPlus,
    ClassifierFree,
    Guidance,
    GuidanceInterval,
    PerpendicularNegative,
    Rescaled,
    is_guided,
)
from latentgen.diffusion.scheduler import Scheduler
from latentgen.errors import InputError
from latentgen.pipelines.conditioning import PromptInput

WHOLE = (0.0, 1.0)
# Far beyond any use; it keeps the arithmetic finite.
MAX_NEGATIVE_SCALE = 1e3


@dataclass(frozen=True)
class GuidanceOptions:
    """What guidance does besides following its scale.

    Attributes:
        rescale: how far the result keeps the contrast of the unguided one, 0..1, against over-exposure
            (arXiv:2305.08891, section 3.4); `guidance_rescale` of diffusers. 0.7 is usual for models with
            zero terminal SNR.
        interval: from which to which share of the schedule to guide, each 0..1 (arXiv:2404.07724); elsewhere a step
            takes half the time.
        perpendicular: None, or how strongly to lead away from that part of the negative prompt which does not speak
            against the prompt (arXiv:2304.04968); 1 is usual. A step takes half as long again.
        plus_plus: guide by CFG++ (arXiv:2406.08070): guidance_scale is then from 0 to 1, 0.6 is usual, and the solver
            one of a single evaluation: ddim, ddpm, euler, euler_ancestral. Goes with none of the others.

    Raises:
        InputError: a value is out of bounds.
    """

    rescale: float = 0.0
    interval: tuple[float, float] = WHOLE
    perpendicular: float | None = None
    plus_plus: bool = False

    def __post_init__(self) -> None:
        if not _is_number(self.rescale, 1.0):
            raise InputError(f"rescale={self.rescale!r} must be a number from 0 to 1; 0.7 is usual")
        ends = self.interval if isinstance(self.interval, tuple) else ()
        if len(ends) != 2 or not all(_is_number(end, 1.0) for end in ends) or ends[0] >= ends[1]:
            raise InputError(
                f"interval={self.interval!r} must be two rising numbers from 0 to 1, such as (0.1, 0.8)"
            )
        if self.perpendicular is not None and not _is_number(self.perpendicular, MAX_NEGATIVE_SCALE):
            raise InputError(
                f"perpendicular={self.perpendicular!r} must be None or a number from 0 to {MAX_NEGATIVE_SCALE:g}; 1 is "
                "usual"
            )

        if not isinstance(self.plus_plus, bool):
            raise InputError(f"plus_plus={self.plus_plus!r} must be True or False")
        if self.plus_plus and (self.rescale, self.interval, self.perpendicular) != (0.0, WHOLE, None):
            raise InputError(
                "plus_plus goes with no other option of guidance; leave rescale, interval and so on out"
            )

    def guidance(self, guidance_scale: float, scheduler: Scheduler) -> Guidance:
        """The guidance of these options; no guidance for a scale of 1 or less, but for CFG++.

        Raises:
            InputError: CFG++ with a scale above 1, or with a solver that does not allow it.
        """
        if self.plus_plus:
            return _cfg_plus_plus(guidance_scale, scheduler)
        guidance: Guidance = ClassifierFree(guidance_scale)
        if not is_guided(guidance_scale):
            return guidance
        if self.perpendicular is not None:
            guidance = PerpendicularNegative(guidance_scale, self.perpendicular)
        if self.rescale > 0:
            guidance = Rescaled(guidance, self.rescale)
        if self.interval != WHOLE:
            highest, lowest = (scheduler.schedule.cutoff(share) for share in self.interval)
            guidance = GuidanceInterval(guidance, lowest, highest)
        return guidance


def _cfg_plus_plus(guidance_scale: float, scheduler: Scheduler) -> CFGPlusPlus:
    if not 0 <= guidance_scale <= 1:
        raise InputError(
            f"guidance_scale={guidance_scale:g} must be from 0 to 1 for plus_plus; 0.6 does what 7.5 does without"
        )
    if not scheduler.supports_cfg_pp:
        raise InputError(
            f"plus_plus does not go with the solver {scheduler.name}; use ddim, ddpm, euler or euler_ancestral"
        )
    return CFGPlusPlus(guidance_scale)


class GuidanceCall(NamedTuple):
    """A guidance, and the texts of its rows.

    Attributes:
        guidance: what becomes of the outputs for one image.
        negatives: the text of each row but the last, whose text is the prompt: row by row, one for each image.
    """

    guidance: Guidance
    negatives: tuple[PromptInput, ...]


def _is_number(value: object, highest: float) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float) and 0 <= value <= highest
