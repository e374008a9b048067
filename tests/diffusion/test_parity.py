"""Step for step against diffusers' schedulers: same noise, same network, every spacing."""

from __future__ import annotations

import inspect
import json
from itertools import product
from typing import Any

import diffusers
import pytest

from latentgen.diffusion.scheduler import Scheduler
from tests.diffusion.references import (
    IN_SIGMA_VE,
    STABLE_DIFFUSION,
    largest_relative_difference,
    network,
    normal_noise,
    run_diffusers,
    run_ours,
    run_over,
    scheduler_class,
)

# Warned of in numpy's own name, so not to be told in general from what we hand to it.
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__ must:DeprecationWarning:numpy")

SPACINGS = ("linspace", "leading", "trailing")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
NUM_STEPS = (5, 10, 50)
TOLERANCE = 1e-5

THRESHOLDING = {"thresholding": True, "sample_max_value": 2.0}
SDE = {"algorithm_type": "sde-dpmsolver++"}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("DDPMScheduler", {"clip_sample": False}),
    ("DDPMScheduler", {}),
    ("DDPMScheduler", THRESHOLDING),
    ("DDPMScheduler", {"variance_type": "fixed_small_log", "clip_sample": False}),
    ("DDIMScheduler", {"clip_sample": False}),
    ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
    ("DDIMScheduler", {"clip_sample_range": 0.7}),
    ("DDIMScheduler", THRESHOLDING),
    ("PNDMScheduler", {"skip_prk_steps": True}),
    ("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": True}),
    ("PNDMScheduler", {"skip_prk_steps": False}),
    ("EulerDiscreteScheduler", {}),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    ("EulerDiscreteScheduler", {"final_sigmas_type": "sigma_min"}),
    ("EulerAncestralDiscreteScheduler", {}),
    ("HeunDiscreteScheduler", {}),
    ("HeunDiscreteScheduler", {"use_karras_sigmas": True}),
    ("HeunDiscreteScheduler", {"clip_sample": True, "clip_sample_range": 0.7}),
    ("KDPM2DiscreteScheduler", {}),
    ("KDPM2DiscreteScheduler", {"use_karras_sigmas": True}),
    ("KDPM2AncestralDiscreteScheduler", {}),
    ("KDPM2AncestralDiscreteScheduler", {"use_karras_sigmas": True}),
    ("DPMSolverMultistepScheduler", {}),
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    ("DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min"}),
    ("DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min", "lower_order_final": False}),
    ("DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min", "euler_at_final": True}),
    ("DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min", "use_karras_sigmas": True}),
    ("DPMSolverMultistepScheduler", THRESHOLDING),
    ("DPMSolverMultistepScheduler", SDE),
    ("DPMSolverMultistepScheduler", {**SDE, "use_karras_sigmas": True}),
    ("DPMSolverMultistepScheduler", {**SDE, "final_sigmas_type": "sigma_min", "lower_order_final": False}),
    ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    ("DPMSolverMultistepScheduler", {"solver_order": 3, "use_karras_sigmas": True}),
    (
        "DPMSolverMultistepScheduler",
        {"solver_order": 3, "final_sigmas_type": "sigma_min", "lower_order_final": False},
    ),
    ("DPMSolverSDEScheduler", {}),
    ("DPMSolverSDEScheduler", {"use_karras_sigmas": True}),
    ("DEISMultistepScheduler", {}),
    ("DEISMultistepScheduler", {"use_karras_sigmas": True}),
    ("DEISMultistepScheduler", {"lower_order_final": False, **THRESHOLDING}),
    ("UniPCMultistepScheduler", {}),
    ("UniPCMultistepScheduler", {"use_karras_sigmas": True}),
    ("UniPCMultistepScheduler", {"final_sigmas_type": "sigma_min"}),
    ("UniPCMultistepScheduler", {"final_sigmas_type": "sigma_min", "lower_order_final": False}),
    ("UniPCMultistepScheduler", THRESHOLDING),
    ("LMSDiscreteScheduler", {}),
    ("LMSDiscreteScheduler", {"use_karras_sigmas": True}),
]
CASES += [
    (class_name, {**options, flag: True})
    for class_name, options in CASES
    for flag in ("use_exponential_sigmas", "use_beta_sigmas")
    if options in ({}, SDE)
    and "use_karras_sigmas" in inspect.signature(scheduler_class(class_name)).parameters
]


def build_diffusers(class_name: str, config: dict[str, Any]) -> Any:
    return scheduler_class(class_name)(**config)


def build_ours(class_name: str, config: dict[str, Any]) -> Scheduler:
    return Scheduler.from_config({"_class_name": class_name, **config})


def difference(class_name: str, config: dict[str, Any], *step_counts: int) -> float:
    """The largest over runs of so many steps, by default of NUM_STEPS."""
    theirs, ours = build_diffusers(class_name, config), build_ours(class_name, config)
    return max(
        largest_relative_difference(run_ours(ours, num_steps), run_diffusers(theirs, num_steps))
        for num_steps in step_counts or NUM_STEPS
    )


def is_comparable(class_name: str, spacing: str, prediction_type: str) -> bool:
    """diffusers' DDIM and PNDM are not on `linspace` (see below), and some of its classes have no `sample`."""
    lands_beside = class_name in ("DDIMScheduler", "PNDMScheduler") and spacing == "linspace"
    has_no_sample = class_name in (
        "PNDMScheduler",
        "EulerAncestralDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "KDPM2AncestralDiscreteScheduler",
        "DPMSolverSDEScheduler",
    )
    return not (lands_beside or (has_no_sample and prediction_type == "sample"))


@pytest.mark.parametrize(
    ("class_name", "options", "spacing", "prediction_type"),
    [
        (class_name, options, spacing, prediction_type)
        for (class_name, options), spacing, prediction_type in product(CASES, SPACINGS, PREDICTION_TYPES)
        if is_comparable(class_name, spacing, prediction_type)
    ],
)
def test_every_step_agrees(
    class_name: str, options: dict[str, Any], spacing: str, prediction_type: str
) -> None:
    config = {**STABLE_DIFFUSION, **options, "timestep_spacing": spacing, "prediction_type": prediction_type}
    # The weights of LMS's last step on exponential sigmas are so large that float32 loses a digit (float64: 2e-6).
    extrapolates = class_name == "LMSDiscreteScheduler" and "use_exponential_sigmas" in options
    assert difference(class_name, config) <= (3e-5 if extrapolates else TOLERANCE)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lower_order_final": True},
        {"use_karras_sigmas": True},
        {"use_exponential_sigmas": True, "beta_start": 0.00085, "beta_end": 0.012},
        {"use_beta_sigmas": True, "beta_start": 0.00085, "beta_end": 0.012},
        {"final_sigmas_type": "sigma_min"},
        {"final_sigmas_type": "sigma_min", "lower_order_final": True},
        THRESHOLDING,
    ],
)
def test_every_step_of_a_single_step_solver_agrees(options: dict[str, Any], prediction_type: str) -> None:
    """diffusers' DPMSolverSinglestep has but one spacing."""
    config = {"beta_schedule": "scaled_linear", **options, "prediction_type": prediction_type}
    # The class writes lower_order_final over for odd counts, so each run has an object of its own.
    for num_steps in (*NUM_STEPS, 2, 15):
        assert difference("DPMSolverSinglestepScheduler", config, num_steps) <= TOLERANCE


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize(
    ("class_name", "options"),
    [
        ("LCMScheduler", {}),
        ("LCMScheduler", {"original_inference_steps": 100, "timestep_scaling": 0.01}),
        ("LCMScheduler", {"set_alpha_to_one": False, "steps_offset": 1, "timestep_spacing": "trailing"}),
        ("LCMScheduler", {"clip_sample": True}),
        ("LCMScheduler", THRESHOLDING),
        ("TCDScheduler", {}),
        ("TCDScheduler", {"set_alpha_to_one": False, "steps_offset": 1, "timestep_spacing": "trailing"}),
        ("TCDScheduler", {"clip_sample": True}),
    ],
)
def test_every_step_of_a_distilled_model_agrees(
    class_name: str, options: dict[str, Any], prediction_type: str
) -> None:
    config = {**options, "prediction_type": prediction_type}
    assert difference(class_name, config, 1, 2, 4, 8, 50) <= TOLERANCE


FLOW = "FlowMatchEulerDiscreteScheduler"


@pytest.mark.parametrize(
    "flag", [None, "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"], ids=str
)
@pytest.mark.parametrize("options", [{}, {"shift": 3.0}, {"shift": 0.4, "num_train_timesteps": 500}])
def test_every_step_of_flow_matching_agrees(options: dict[str, Any], flag: str | None) -> None:
    config = {**options, flag: True} if flag else options
    assert difference(FLOW, config, *NUM_STEPS, 1, 2) <= TOLERANCE


@pytest.mark.parametrize("options", [{}, {"shift": 3.0}])
@pytest.mark.parametrize("sigmas", [[1.0, 0.75, 0.5, 0.25], [0.9, 0.3], [0.001], [1.0, 0.4, 0.0]])
def test_flow_matching_by_hand_agrees(sigmas: list[float], options: dict[str, Any]) -> None:
    ours = build_ours(FLOW, options)
    theirs = run_diffusers(build_diffusers(FLOW, options), None, sigmas=sigmas)
    if sigmas[-1] == 0.0:
        # There they ask once more at clean data, and stay where they are.
        assert theirs.latents.pop().equal(theirs.latents[-1])
    assert largest_relative_difference(run_over(ours, ours.levels_at(sigmas=sigmas)), theirs) <= TOLERANCE


def test_flow_matching_at_timesteps_by_hand_agrees() -> None:
    timesteps = [1000, 750, 499.5, 20]
    ours = build_ours(FLOW, {})
    theirs = run_diffusers(build_diffusers(FLOW, {}), None, timesteps=timesteps)
    assert (
        largest_relative_difference(run_over(ours, ours.levels_at(timesteps=timesteps)), theirs) <= TOLERANCE
    )


def test_flow_matching_tells_the_network_where_it_stands() -> None:
    """The intended departure: diffusers shifts the levels of timesteps by hand, and tells the network others."""
    levels = build_ours(FLOW, {"shift": 3.0}).levels_at(timesteps=[900, 300])
    assert [level.timestep for level in levels] == [900.0, 300.0, 0.0]
    assert [level.sigma for level in levels] == pytest.approx([0.9, 0.3, 0.0])


@pytest.mark.parametrize("options", [{}, {"beta_schedule": "squaredcos_cap_v2"}], ids=["linear", "cosine"])
@pytest.mark.parametrize(
    "class_name",
    [
        "DDPMScheduler",
        "DDIMScheduler",
        "PNDMScheduler",
        "EulerDiscreteScheduler",
        "HeunDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "LMSDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "DEISMultistepScheduler",
        "UniPCMultistepScheduler",
    ],
)
def test_other_schedules_agree(class_name: str, options: dict[str, Any]) -> None:
    # The cosine schedule's last sigma_ve is 20,000, where Euler's own scale has no digits left in float32, and where
    # PNDM's first guess is so large that the network's answer to it has none.
    spacing = "leading" if class_name in (*IN_SIGMA_VE, "PNDMScheduler") else "trailing"
    assert difference(class_name, {**options, "timestep_spacing": spacing}) <= TOLERANCE


@pytest.mark.parametrize(
    "class_name",
    [
        "EulerDiscreteScheduler",
        "LMSDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "UniPCMultistepScheduler",
    ],
)
def test_karras_sigmas_agree_on_the_linear_schedule(class_name: str) -> None:
    assert difference(class_name, {"use_karras_sigmas": True}) <= TOLERANCE


@pytest.mark.parametrize(
    ("class_name", "tolerance"),
    [
        ("DDPMScheduler", TOLERANCE),
        ("DDIMScheduler", TOLERANCE),
        # At sigma_ve 4096 diffusers' own float32 steps lose four digits: x = 4096 * noise + x0.
        ("EulerDiscreteScheduler", 1e-4),
        ("EulerAncestralDiscreteScheduler", 1e-4),
        ("DPMSolverMultistepScheduler", TOLERANCE),
        ("UniPCMultistepScheduler", TOLERANCE),
        ("LCMScheduler", TOLERANCE),
        ("TCDScheduler", TOLERANCE),
    ],
)
def test_zero_terminal_snr_agrees(class_name: str, tolerance: float) -> None:
    config = {
        **STABLE_DIFFUSION,
        "rescale_betas_zero_snr": True,
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
    }
    assert difference(class_name, config) <= tolerance


@pytest.mark.parametrize("num_steps", NUM_STEPS)
def test_ddim_ends_each_step_where_the_next_begins(num_steps: int) -> None:
    """The intended departure: on `linspace`, diffusers' DDIM lands beside the level of its own next step.

    Ours visits the same timesteps; Euler, the same step, is the oracle when it is given these by hand.
    """
    scheduler = build_ours("DDIMScheduler", {"timestep_spacing": "linspace", "clip_sample": False})
    levels = scheduler.levels(num_steps)
    ddim = diffusers.DDIMScheduler(timestep_spacing="linspace")
    ddim.set_timesteps(num_steps)
    assert [level.timestep for level in levels[:-1]] == ddim.timesteps.tolist()

    oracle = diffusers.EulerDiscreteScheduler()
    oracle.set_timesteps(timesteps=[int(level.timestep) for level in levels[:-1]])
    _, noise = normal_noise()
    x = start = noise()
    for index, timestep in enumerate(oracle.timesteps):
        if index == 0:
            x = start * (1 + oracle.sigmas[0] ** 2) ** 0.5
        x = oracle.step(network(oracle.scale_model_input(x, timestep), timestep), timestep, x).prev_sample

    *_, last = scheduler.sample(
        lambda x, level: (x - level.sigma * network(x, level.timestep)) / level.alpha, start, levels, noise
    )
    assert (last.latents - x).norm() / x.norm() <= TOLERANCE


@pytest.mark.parametrize(
    "class_name",
    [
        *sorted({name for name, _ in CASES}),
        "DPMSolverSinglestepScheduler",
        "LCMScheduler",
        "TCDScheduler",
        FLOW,
    ],
)
def test_saved_configs_load_in_both_directions(class_name: str) -> None:
    theirs_class = scheduler_class(class_name)
    known = inspect.signature(theirs_class).parameters
    options = {key: value for key, value in STABLE_DIFFUSION.items() if key in known}
    saved = json.loads(theirs_class(**options).to_json_string())
    ours = Scheduler.from_config(saved)
    written = json.loads(json.dumps(ours.to_config()))
    assert Scheduler.from_config(written) == ours

    theirs = theirs_class.from_config(written)
    assert largest_relative_difference(run_ours(ours, 10), run_diffusers(theirs, 10)) <= TOLERANCE


@pytest.mark.parametrize(
    ("name", "class_name", "options"),
    [
        ("ddpm", "DDPMScheduler", {}),
        ("ddim", "DDIMScheduler", {}),
        ("euler", "EulerDiscreteScheduler", {}),
        ("euler_karras", "EulerDiscreteScheduler", {"use_karras_sigmas": True}),
        ("euler_ancestral", "EulerAncestralDiscreteScheduler", {}),
        ("dpmpp_2m", "DPMSolverMultistepScheduler", {}),
        ("dpmpp_2m_karras", "DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
        ("heun", "HeunDiscreteScheduler", {}),
        ("dpm2", "KDPM2DiscreteScheduler", {}),
        ("dpm2_ancestral_karras", "KDPM2AncestralDiscreteScheduler", {"use_karras_sigmas": True}),
        ("dpmpp_sde", "DPMSolverSDEScheduler", {}),
        ("dpmpp_2s", "DPMSolverSinglestepScheduler", {}),
        ("deis", "DEISMultistepScheduler", {}),
        ("unipc", "UniPCMultistepScheduler", {}),
        ("euler_exponential", "EulerDiscreteScheduler", {"use_exponential_sigmas": True}),
        ("dpmpp_2m_beta", "DPMSolverMultistepScheduler", {"use_beta_sigmas": True}),
        ("lms_karras", "LMSDiscreteScheduler", {"use_karras_sigmas": True}),
        ("dpmpp_2m_sde", "DPMSolverMultistepScheduler", SDE),
        ("dpmpp_3m", "DPMSolverMultistepScheduler", {"solver_order": 3}),
        ("pndm", "PNDMScheduler", {"skip_prk_steps": True}),
        ("pndm_prk", "PNDMScheduler", {"skip_prk_steps": False}),
        ("lcm", "LCMScheduler", {}),
        ("tcd", "TCDScheduler", {}),
    ],
)
@pytest.mark.parametrize("spacing", [{}, {"timestep_spacing": "trailing"}])
def test_a_change_of_solver_is_diffusers_from_config(
    name: str, class_name: str, options: dict[str, Any], spacing: dict[str, str]
) -> None:
    """Solver names change what diffusers' `OtherScheduler.from_config(scheduler.config)` changes, no more."""
    checkpoint = diffusers.DDIMScheduler(
        **STABLE_DIFFUSION, clip_sample=False, set_alpha_to_one=False, **spacing
    )
    theirs = scheduler_class(class_name).from_config(checkpoint.config, **options)
    stored = {**STABLE_DIFFUSION, "clip_sample": False, "set_alpha_to_one": False, **spacing}
    ours = build_ours("DDIMScheduler", stored).with_solver(name)
    assert ours.name == name
    assert largest_relative_difference(run_ours(ours, 10), run_diffusers(theirs, 10)) <= TOLERANCE


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize(
    ("class_name", "by_hand"),
    [
        ("EulerDiscreteScheduler", {"timesteps": [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]}),
        ("EulerDiscreteScheduler", {"sigmas": [14.615, 6.475, 2.697, 1.396, 0.652, 0.152, 0.0]}),
        ("EulerDiscreteScheduler", {"sigmas": [9.5, 1.2, 0.3]}),
        ("DPMSolverMultistepScheduler", {"timesteps": [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]}),
        ("DPMSolverMultistepScheduler", {"timesteps": [700, 20, 0]}),
        ("HeunDiscreteScheduler", {"timesteps": [999, 600, 350, 20]}),
        ("DDPMScheduler", {"timesteps": [999, 600, 350, 20]}),
    ],
)
def test_runs_by_hand_agree(class_name: str, by_hand: dict[str, Any], prediction_type: str) -> None:
    config = {**STABLE_DIFFUSION, "prediction_type": prediction_type}
    ours = build_ours(class_name, config)
    theirs = run_diffusers(build_diffusers(class_name, config), None, **by_hand)
    assert largest_relative_difference(run_over(ours, ours.levels_at(**by_hand)), theirs) <= TOLERANCE
