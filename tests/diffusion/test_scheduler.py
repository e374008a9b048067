from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from latentgen.diffusion.flow_matching import FlowSchedule
from latentgen.diffusion.prediction import PredictionType, add_noise
from latentgen.diffusion.schedule import CLEAN, NoiseLevel, NoiseSchedule
from latentgen.diffusion.scheduler import Scheduler, Step
from latentgen.diffusion.solver_names import SOLVER_NAMES, SOLVER_TABLE, SolverName
from latentgen.diffusion.solvers.table import SOLVERS
from latentgen.errors import ConfigError, InputError
from tests.diffusion.checkpoints import DIFFUSION, FLOW, scheduler_named

SHAPE = (1, 4, 4, 4)


def denoise(x: Tensor, level: NoiseLevel) -> Tensor:
    return torch.tanh(x * level.alpha)


def start(seed: int) -> tuple[torch.Generator, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return generator, torch.randn(SHAPE, generator=generator)


def run(scheduler: Scheduler, num_steps: int, seed: int) -> list[Step]:
    generator, latents = start(seed)
    levels = scheduler.levels(num_steps)
    begin = scheduler.initial(latents, levels)
    return list(scheduler.sample(denoise, begin, levels, lambda: torch.randn(SHAPE, generator=generator)))


class NoNoise:
    """Zeros in place of noise, and a count of the draws."""

    def __init__(self) -> None:
        self.num_draws = 0

    def __call__(self) -> Tensor:
        self.num_draws += 1
        return torch.zeros(SHAPE)


def test_solver_names() -> None:
    names = set(SOLVER_NAMES)
    assert names >= {"ddim", "pndm_prk", "euler_karras", "dpmpp_2m_exponential", "dpmpp_2m_sgm_uniform"}
    assert names.isdisjoint({"ddim_karras", "euler_ancestral_karras", "lcm_beta"})
    assert len(names) == 21 + 13 * 6 + 3 + 3


@pytest.mark.parametrize("name", SOLVER_NAMES)
def test_a_run_falls_to_clean_data_and_reports_each_step(name: str) -> None:
    scheduler = scheduler_named(name)
    levels = scheduler.levels(6)
    assert len(levels) == 7
    # On sigmas from end to end DEIS evaluates its final level.
    reaches = name in ("deis_karras", "deis_exponential", "deis_beta")
    falling = levels[:-1] if reaches else levels
    assert all(level.sigma > target.sigma for level, target in pairwise(falling))
    ends_noisy = scheduler.solver in ("ddim", "pndm", "pndm_prk", "deis", "tcd")
    assert levels[-1] == (scheduler.schedule.level(0) if ends_noisy else CLEAN)
    steps = run(scheduler, 6, seed=0)
    assert [step.index for step in steps] == list(range(6))
    assert [step.level for step in steps] == list(levels[1:])
    assert all(step.latents.shape == step.x0.shape == SHAPE for step in steps)


@pytest.mark.parametrize(("start", "stop"), [(0, 6), (0, 1), (2, 4), (5, 6)])
@pytest.mark.parametrize("name", [*SOLVER_TABLE, "deis_karras"])
def test_evaluation_levels_contain_every_level_at_which_the_network_is_evaluated(
    name: str, start: int, stop: int
) -> None:
    scheduler = scheduler_named(name)
    levels = scheduler.levels(6)
    evaluated = []

    def denoiser(x: Tensor, level: NoiseLevel) -> Tensor:
        evaluated.append(level)
        return denoise(x, level)

    list(scheduler.sample(denoiser, torch.ones(SHAPE), levels, NoNoise(), start=start, stop=stop))
    known = scheduler.evaluation_levels(levels, start=start, stop=stop)
    assert set(evaluated) <= set(known)
    assert len(set(known)) == len(known)
    assert (levels[-1] in known) == (levels[-1] in levels[start:stop])  # DEIS may be there before


@pytest.mark.parametrize(
    ("name", "num_steps", "evaluations"), [("pndm", 1, 1), ("pndm", 9, 10), ("pndm_prk", 9, 18)]
)
def test_how_often_the_network_is_evaluated(name: str, num_steps: int, evaluations: int) -> None:
    """As many times as diffusers has timesteps."""
    scheduler, timesteps = scheduler_named(name), []

    def denoiser(x: Tensor, level: NoiseLevel) -> Tensor:
        timesteps.append(level.timestep)
        return denoise(x, level)

    levels = scheduler.levels(num_steps)
    list(scheduler.sample(denoiser, torch.ones(SHAPE), levels, NoNoise()))
    assert len(timesteps) == evaluations


@pytest.mark.parametrize("name", SOLVER_TABLE)
def test_inputs_are_not_changed(name: str) -> None:
    _, latents = start(0)
    before = latents.clone()
    scheduler = scheduler_named(name)
    levels = scheduler.levels(4)
    list(scheduler.sample(denoise, scheduler.initial(latents, levels), levels, NoNoise()))
    assert torch.equal(latents, before)


def test_a_run_may_begin_at_a_later_level() -> None:
    """What image to image does: the tail of a run from its own latents is the same run."""
    levels = DIFFUSION.levels(10)
    whole = run(DIFFUSION, 10, seed=3)
    tail = list(DIFFUSION.sample(denoise, whole[3].latents, levels[4:], NoNoise()))
    assert len(tail) == 6
    assert torch.equal(tail[-1].latents, whole[-1].latents)


def test_every_row_of_a_batch_is_its_own_run() -> None:
    scheduler = DIFFUSION.with_solver("dpmpp_2m_karras")
    levels = scheduler.levels(9)
    rows = [start(seed)[1] for seed in range(4)]
    *_, batch = scheduler.sample(denoise, torch.cat(rows), levels, NoNoise())
    for index, row in enumerate(rows):
        *_, alone = scheduler.sample(denoise, row, levels, NoNoise())
        torch.testing.assert_close(batch.latents[index : index + 1], alone.latents, rtol=1e-6, atol=1e-6)


DRAWS = {
    **{"ddpm": 5, "euler_ancestral": 5, "dpmpp_2m_sde": 5, "dpmpp_3m_sde": 5, "dpmpp_sde": 8},
    **{"lcm": 4, "tcd": 4, "dpm2_ancestral": 4},
}


@pytest.mark.parametrize("name", SOLVER_TABLE)
def test_noise_is_drawn_only_where_a_step_uses_it(name: SolverName) -> None:
    noise = NoNoise()
    scheduler = scheduler_named(name)
    list(scheduler.sample(denoise, start(0)[1], scheduler.levels(5), noise))
    assert noise.num_draws == DRAWS.get(name, 0)


@pytest.mark.parametrize("name", ["lcm", "tcd"])
def test_a_distilled_model_takes_no_more_steps_than_it_was_distilled_on(name: str) -> None:
    scheduler = scheduler_named(name)
    assert len(scheduler.levels(50)) == 51
    with pytest.raises(InputError, match=r"original_inference_steps.*1\.\.50"):
        scheduler.levels(51)
    with pytest.raises(ConfigError, match="original_inference_steps"):
        replace(scheduler, schedule=NoiseSchedule(num_train_timesteps=49)).levels(4)


@pytest.mark.parametrize("num_steps", [0, -1, 1001, True, 2.5, "10"])
def test_bad_step_counts_are_refused(num_steps: int) -> None:
    with pytest.raises(InputError, match="number of steps"):
        DIFFUSION.levels(num_steps)


def test_a_run_needs_two_levels() -> None:
    with pytest.raises(InputError, match="two noise levels"):
        DIFFUSION.sample(denoise, start(0)[1], (CLEAN,), NoNoise())


@pytest.mark.parametrize("solver", ["ddim", "ddpm"])
def test_epsilon_at_zero_snr_is_refused_where_it_cannot_work(solver: str) -> None:
    zero_snr = Scheduler(NoiseSchedule(rescale_betas_zero_snr=True), spacing="trailing").with_solver(solver)
    with pytest.raises(ConfigError, match="epsilon"):
        zero_snr.levels(10)
    assert zero_snr.with_solver("euler").levels(10)[0].alpha > 0


@pytest.mark.parametrize("name", SOLVER_TABLE)
def test_every_solver_runs_by_hand(name: str) -> None:
    scheduler = scheduler_named(name)
    runs = [scheduler.levels_at(timesteps=[950, 600, 200, 30])]
    if SOLVERS[scheduler.solver].in_sigma_ve:
        runs += [scheduler.levels_at(sigmas=[12.0, 3.0, 0.5, 0.1, end]) for end in (0.0, 0.05)]
    for levels in runs:
        assert len(levels) == 5
        *_, last = scheduler.sample(denoise, start(0)[1], levels, NoNoise())
        assert last.latents.isfinite().all()


@pytest.mark.parametrize(
    ("solver", "by_hand", "named"),
    [
        ("euler", {}, "timesteps or sigmas"),
        ("euler", {"timesteps": [1], "sigmas": [1.0, 0.0]}, "timesteps or sigmas"),
        ("euler", {"timesteps": []}, r"timesteps.* 0 .*1\.\.1001"),
        ("euler", {"timesteps": range(2000, 0, -1)}, "timesteps.* 2000"),
        ("euler", {"timesteps": [500, 700]}, "timesteps.* 700 .*500"),
        ("euler", {"timesteps": [500, 500]}, "timesteps.* 500"),
        ("euler", {"timesteps": [1001]}, r"timesteps\[0\] is 1001.*0\.\.999"),
        ("euler", {"timesteps": [5, -1]}, r"timesteps\[1\] is -1"),
        ("euler", {"timesteps": [float("nan")]}, r"timesteps\[0\] is nan"),
        ("euler", {"timesteps": ["many"]}, "timesteps"),
        ("euler", {"timesteps": 3}, "timesteps"),
        ("dpmpp_2m", {"timesteps": [500.5]}, "timesteps.* dpmpp_2m"),
        ("ddim", {"timesteps": [500.5]}, "timesteps.* ddim"),
        ("ddim", {"sigmas": [3.0, 0.0]}, "ddim .*sigmas"),
        ("euler", {"sigmas": [3.0]}, "sigmas"),
        ("euler", {"sigmas": [30.0, 0.0]}, r"sigmas\[0\] is 30"),
        ("euler", {"sigmas": [float("inf"), 0.0]}, r"sigmas\[0\] is inf"),
        ("euler", {"sigmas": [3.0, 0.0, 0.0]}, r"sigmas.*\[2\]"),
        ("flow_euler", {"sigmas": [1.1, 0.5]}, r"sigmas\[0\] is 1\.1.*0\.\.1"),
        ("flow_euler", {"sigmas": [0.5, 0.7]}, "sigmas.* 0.7 .*0.5"),
        ("flow_euler", {"sigmas": [0.0]}, "sigmas.* 0"),
        ("flow_euler", {"timesteps": [1001.0]}, r"timesteps\[0\] is 1001.*0\.\.1000"),
        ("flow_euler", {"timesteps": [float("nan")]}, r"timesteps\[0\] is nan"),
    ],
)
def test_bad_lists_by_hand_are_refused(solver: str, by_hand: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        scheduler_named(solver).levels_at(**by_hand)


@pytest.mark.parametrize(
    ("scheduler", "name", "named"),
    [
        *(
            (FLOW, name, "FlowSchedule.* flow_euler, flow_euler_karras")
            for name in ("DPM++ 2M Karras", "ddim")
        ),
        *((DIFFUSION, name, "'flow_euler'.*NoiseSchedule") for name in ("Flow Euler Karras", "flow_euler")),
    ],
    ids=str,
)
def test_solvers_of_the_other_kind_of_model_are_refused(scheduler: Scheduler, name: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        scheduler.with_solver(name)


@pytest.mark.parametrize("scheduler", [FLOW, DIFFUSION], ids=["flow", "diffusion"])
@pytest.mark.parametrize("prediction_type", get_args(PredictionType))
def test_prediction_types_go_with_their_schedule(
    scheduler: Scheduler, prediction_type: PredictionType
) -> None:
    if (prediction_type == "flow_prediction") == (scheduler is FLOW):
        assert replace(scheduler, prediction_type=prediction_type).prediction_type == prediction_type
    else:
        with pytest.raises(ConfigError, match=f"prediction_type is '{prediction_type}'.* it must be"):
            replace(scheduler, prediction_type=prediction_type)


@pytest.mark.parametrize(
    ("share", "steps"), [(0.0, 0), (0.1, 1), (0.25, 1), (0.251, 2), (0.5, 2), (0.9, 4), (1.0, 4)]
)
def test_a_share_of_a_run_of_flow_matching(share: float, steps: int) -> None:
    scheduler = replace(FLOW, schedule=FlowSchedule())
    levels = scheduler.levels_at(timesteps=[1000, 750, 500, 250])
    assert scheduler.steps_before(levels, share) == steps


def test_flow_matching_is_a_straight_line_for_one_data_point() -> None:
    """Where the velocity is known, Euler's steps are exact, however few there are."""
    x0, noise = start(0)[1], start(1)[1]
    levels = FLOW.levels(3)
    runs = FLOW.sample(lambda x, level: x0, FLOW.initial(noise, levels), levels, NoNoise())
    for step in runs:
        torch.testing.assert_close(step.latents, add_noise(x0, noise, step.level), rtol=1e-6, atol=1e-6)
