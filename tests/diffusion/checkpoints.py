"""Schedulers for every solver: a diffusion model's, and a flow-matching model's for its solver."""

from __future__ import annotations

from latentgen.diffusion.flow_matching import FlowSchedule
from latentgen.diffusion.schedule import NoiseSchedule
from latentgen.diffusion.scheduler import Scheduler
from latentgen.diffusion.solver_names import NAMED
from latentgen.diffusion.solvers.table import SOLVERS

DIFFUSION = Scheduler(
    NoiseSchedule(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
    set_alpha_to_one=False,
    steps_offset=1,
)
FLOW = Scheduler(FlowSchedule(shift=3.0), "flow_prediction", "flow_euler")


def scheduler_named(name: str) -> Scheduler:
    """With the solver and the spacing of the library's own name."""
    is_flow = SOLVERS[NAMED[name][0]].flow
    return (FLOW if is_flow else DIFFUSION).with_solver(name)
