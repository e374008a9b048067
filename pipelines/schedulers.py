"""The scheduler that a call chooses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias

from latentgen.diffusion.scheduler import Scheduler
from latentgen.errors import InputError

if TYPE_CHECKING:
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

# What a call takes for its scheduler: the name of a solver, a Scheduler, or a scheduler of diffusers.
AnyScheduler: TypeAlias = "str | Scheduler | SchedulerMixin"


def chosen_scheduler(choice: AnyScheduler | None, own: Scheduler, *, is_sdxl: bool) -> Scheduler:
    """What a call chooses over the pipeline's own scheduler, of which a name changes the solver alone.

    Raises:
        InputError: no such solver, or no scheduler at all.
        ConfigError: a scheduler of diffusers that is not known here.
    """
    if choice is None:
        return own
    if isinstance(choice, str):
        chosen = own.with_solver(choice)
        aligned_to_sd = is_sdxl and chosen.sigmas == "align_your_steps"
        return replace(chosen, sigmas="align_your_steps_xl") if aligned_to_sd else chosen
    if isinstance(choice, Scheduler):
        return choice
    config = getattr(choice, "config", None)  # of diffusers, which need not be installed
    if not isinstance(config, Mapping):
        raise InputError(
            f"scheduler must be a name, a Scheduler or one of diffusers, not {type(choice).__name__}"
        )
    return Scheduler.from_config({**config, "_class_name": type(choice).__name__})
