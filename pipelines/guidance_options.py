"""Guidance options of a call other than the scale."""

from __future__ import annotations

from dataclasses import dataclass

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
from latentgen.pipelines.arguments import check_number

WHOLE = (0.0, 1.0)
# Far above any useful value; keeps the arithmetic finite.
MAX_NEGATIVE_SCALE = 1e3


@dataclass(frozen=True)
class GuidanceOptions:
    """Options of classifier-free guidance.

    Attributes:
        rescale: 0..1, how much to rescale the guided prediction to the standard deviation of the positive one, against
            over-exposure (arXiv:2305.08891, section 3.4); diffusers' `guidance_rescale`. 0.7 is usual for models with
            zero terminal SNR.
        interval: start and end of guidance as fractions of the schedule, 0..1 (arXiv:2404.07724); steps outside take
            half the time.
        perpendicular: None, or the scale of the component of the negative direction orthogonal to the positive one
            (arXiv:2304.04968); 1 is usual. A step takes 1.5 times as long.
        plus_plus: use CFG++ (arXiv:2406.08070), with guidance_scale from 0 to 1 (0.6 is usual) and a solver of one
            evaluation per step: ddim, ddpm, euler, euler_ancestral. Cannot be combined with the other options.

    Raises:
        InputError: a value is out of range.
    """

    rescale: float = 0.0
    interval: tuple[float, float] = WHOLE
    perpendicular: float | None = None
    plus_plus: bool = False

    def __post_init__(self) -> None:
        check_number("rescale", self.rescale, 0, 1, "0.7 is usual")
        ends = self.interval if isinstance(self.interval, tuple) else ()
        for end in ends:
            check_number("interval", end, 0, 1, "(0.1, 0.8) is usual")
        if len(ends) != 2 or ends[0] >= ends[1]:
            raise InputError(
                f"interval={self.interval!r} must be two increasing numbers from 0 to 1, such as (0.1, 0.8)"
            )
        if self.perpendicular is not None:
            check_number("perpendicular", self.perpendicular, 0, MAX_NEGATIVE_SCALE, "1 is usual")
        if not isinstance(self.plus_plus, bool):
            raise InputError(f"plus_plus={self.plus_plus!r} must be True or False")
        if self.plus_plus and (self.rescale, self.interval, self.perpendicular) != (0.0, WHOLE, None):
            raise InputError(
                "plus_plus cannot be combined with rescale, interval or perpendicular; remove those"
            )

    def guidance(self, guidance_scale: float, scheduler: Scheduler) -> Guidance:
        """The guidance for a scale; none for a scale of 1 or less, except with CFG++.

        Raises:
            InputError: CFG++ with a scale above 1, or with an unsupported solver.
        """
        if self.plus_plus:
            check_number("guidance_scale", guidance_scale, 0, 1, "0.6 with plus_plus is like 7.5 without")
            if not scheduler.supports_cfg_pp:
                raise InputError(
                    f"plus_plus does not support the solver {scheduler.name}; use ddim, ddpm, euler or euler_ancestral"
                )
            return CFGPlusPlus(guidance_scale)
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
