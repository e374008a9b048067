from __future__ import annotations

from typing import get_args

import diffusers
import pytest

from latentgen.diffusion.solver_names import (
    NAMED,
    SAMPLERS,
    SIGMAS,
    SOLVER_NAMES,
    SOLVER_TABLE,
    Sigmas,
    SolverName,
    canonical_name,
    name_of_sampler,
)
from latentgen.diffusion.solvers.table import SOLVERS
from latentgen.errors import InputError
from tests.diffusion.checkpoints import scheduler_named


def test_every_solver_and_spacing_is_named() -> None:
    assert set(SOLVER_TABLE) == set(SOLVERS) == set(get_args(SolverName))
    assert set(SIGMAS) == set(get_args(Sigmas))
    assert len(set(SAMPLERS.values())) == len(SAMPLERS)


@pytest.mark.parametrize("solver", SOLVER_TABLE)
def test_the_classes_are_those_of_diffusers(solver: SolverName) -> None:
    assert hasattr(diffusers, SOLVER_TABLE[solver].diffusers_class)


@pytest.mark.parametrize("solver", SOLVERS)
def test_only_levels_between_timesteps_are_spaced_so(solver: SolverName) -> None:
    assert not SOLVER_TABLE[solver].sigmas or SOLVERS[solver].in_sigma_ve or SOLVERS[solver].flow


@pytest.mark.parametrize("name", SOLVER_NAMES)
def test_every_name_leads_to_the_same_scheduler(name: str) -> None:
    sampler, schedule_type = SAMPLERS[name]
    written = f"{sampler} {schedule_type}" if schedule_type else sampler
    for spelling in (name, written, written.upper(), f"  {written.lower()}  ", written.replace(" ", "  ")):
        assert canonical_name(spelling) == name
    assert name_of_sampler(sampler, schedule_type) == name
    assert name_of_sampler(written) == name
    assert scheduler_named(name).with_solver(written).name == name
    assert NAMED[name][0] == scheduler_named(name).solver


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("DPM++ 2M Karras", "dpmpp_2m_karras"),
        ("PNDMScheduler", "pndm"),
        ("DPMSolverMultistepScheduler", "dpmpp_2m"),
        ("FlowMatchEulerDiscreteScheduler", "flow_euler"),
        ("flow euler karras", "flow_euler_karras"),
        ("eulerancestraldiscretescheduler", "euler_ancestral"),
    ],
)
def test_what_people_type(name: str, own: str) -> None:
    assert canonical_name(name) == own


@pytest.mark.parametrize(
    ("sampler", "schedule_type", "own"),
    [
        ("DPM++ 2M", "Automatic", "dpmpp_2m_karras"),
        ("DPM++ 2M", "Uniform", "dpmpp_2m"),
        ("DPM++ 2M Karras", "Automatic", "dpmpp_2m_karras"),
        ("Euler", "Automatic", "euler"),
        ("PLMS", None, "pndm"),
    ],
)
def test_schedule_types_of_recipes(sampler: str, schedule_type: str | None, own: str) -> None:
    assert name_of_sampler(sampler, schedule_type) == own


@pytest.mark.parametrize(
    ("name", "proposal"),
    [
        ("DPM++ 2M Karas", "'DPM++ 2M Karras'"),
        ("dpmpp_2m_karas", "'dpmpp_2m_karras'"),
        ("EulerScheduler", "'EulerDiscreteScheduler'"),
        ("euler ancestral", "'euler_ancestral'"),
        ("unipc2", "'unipc'"),
    ],
)
def test_unknown_names_propose_the_nearest(name: str, proposal: str) -> None:
    with pytest.raises(InputError) as caught:
        canonical_name(name)
    assert proposal in str(caught.value)
    assert "`latentgen schedulers`" in str(caught.value)


@pytest.mark.parametrize("name", ["", "?", "x" * 1_000_000, "\0\n", "Euler\x1b[31m"])
def test_what_is_no_name_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(InputError, match="is not known") as caught:
        canonical_name(name)
    assert len(str(caught.value)) < 300
    assert str(caught.value).isprintable()
