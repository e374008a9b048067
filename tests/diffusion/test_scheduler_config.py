from __future__ import annotations

import json
import math
from typing import Any

import pytest

from latentgen.diffusion.flow_matching import FlowSchedule
from latentgen.diffusion.prediction import Clipping
from latentgen.diffusion.schedule import NoiseSchedule
from latentgen.diffusion.scheduler import Scheduler
from latentgen.errors import ConfigError

# The scheduler_config.json of Stable Diffusion 1.5, and that of Stable Diffusion XL.
SD15 = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
SDXL = {
    **SD15,
    "_class_name": "EulerDiscreteScheduler",
    "interpolation_type": "linear",
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "timestep_spacing": "leading",
    "use_karras_sigmas": False,
}
STABLE_DIFFUSION = NoiseSchedule(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def test_stable_diffusion_15() -> None:
    scheduler = Scheduler.from_config(SD15)
    assert scheduler == Scheduler(STABLE_DIFFUSION, solver="pndm", set_alpha_to_one=False, steps_offset=1)


def test_pndm_begins_with_runge_kutta_where_the_file_does_not_say() -> None:
    said = {key: value for key, value in SD15.items() if key != "skip_prk_steps"}
    scheduler = Scheduler.from_config(said)
    assert scheduler.solver == "pndm_prk"
    assert scheduler.to_config()["skip_prk_steps"] is False


def test_stable_diffusion_xl() -> None:
    scheduler = Scheduler.from_config(SDXL)
    assert scheduler == Scheduler(
        STABLE_DIFFUSION, solver="euler", spacing="leading", set_alpha_to_one=False, steps_offset=1
    )


@pytest.mark.parametrize(
    "scheduler",
    [
        Scheduler(),
        Scheduler(
            solver="ddpm", clipping=Clipping(clip_sample=True, thresholding=True, sample_max_value=3.0)
        ),
        Scheduler(STABLE_DIFFUSION, "v_prediction", "euler", "trailing", set_alpha_to_one=False),
        Scheduler(solver="euler", sigmas="karras", final_sigmas_type="sigma_min", steps_offset=1),
        Scheduler(solver="euler_ancestral", clipping=Clipping(clip_sample=True), lower_order_final=False),
        Scheduler(solver="dpmpp_2m", lower_order_final=False, euler_at_final=True),
        Scheduler(solver="pndm", steps_offset=1, set_alpha_to_one=False),
        Scheduler(NoiseSchedule(rescale_betas_zero_snr=True), "v_prediction", "pndm_prk", "trailing"),
        Scheduler(solver="dpmpp_3m_sde", sigmas="karras"),
        Scheduler(solver="euler", sigmas="exponential"),
        Scheduler(solver="dpmpp_2m", sigmas="beta"),
        Scheduler(solver="ddim", sigmas="beta"),
        Scheduler(solver="unipc", sigmas="sgm_uniform"),
        Scheduler(solver="euler_ancestral", sigmas="align_your_steps"),
        Scheduler(solver="lcm", original_inference_steps=40, timestep_scaling=5.0),
        Scheduler(STABLE_DIFFUSION, "sample", "tcd", clipping=Clipping(clip_sample=True)),
        Scheduler(NoiseSchedule(num_train_timesteps=3, trained_betas=(0.1, 0.2, 0.3))),
        Scheduler(NoiseSchedule(rescale_betas_zero_snr=True), "sample", "dpmpp_2m", "linspace"),
        Scheduler(FlowSchedule(), "flow_prediction", "flow_euler"),
        Scheduler(FlowSchedule(500, 3.0), "flow_prediction", "flow_euler", sigmas="beta", steps_offset=1),
    ],
    ids=lambda scheduler: scheduler.name,
)
def test_a_scheduler_survives_the_round_trip(scheduler: Scheduler) -> None:
    assert Scheduler.from_config(json.loads(json.dumps(scheduler.to_config()))) == scheduler


# The scheduler_config.json of Stable Diffusion 3.
SD3 = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "_diffusers_version": "0.29.0.dev0",
    "num_train_timesteps": 1000,
    "shift": 3.0,
}


def test_stable_diffusion_3() -> None:
    scheduler = Scheduler.from_config(SD3)
    assert scheduler == Scheduler(FlowSchedule(shift=3.0), "flow_prediction", "flow_euler")
    flags = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
    assert scheduler.to_config() == {key: SD3[key] for key in SD3 if key != "_diffusers_version"} | flags


def test_the_class_tells_of_flow_matching_whatever_other_classes_left() -> None:
    """As diffusers has it: FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, shift=3)."""
    left = {
        "prediction_type": "epsilon",
        "beta_start": 0.1,
        "timestep_spacing": "leading",
        "clip_sample": True,
    }
    scheduler = Scheduler.from_config({**SD3, **left})
    assert scheduler.levels(10) == Scheduler.from_config(SD3).levels(10)
    assert (scheduler.prediction_type, scheduler.schedule) == ("flow_prediction", FlowSchedule(shift=3.0))


def test_defaults_of_the_classes_that_clip() -> None:
    assert Scheduler.from_config({"_class_name": "DDPMScheduler"}).clipping.clip_sample
    assert Scheduler.from_config({"_class_name": "DDIMScheduler"}).clipping.clip_sample
    assert not Scheduler.from_config({"_class_name": "EulerDiscreteScheduler"}).clipping.clip_sample


def test_negative_infinity_is_how_diffusers_writes_no_bound() -> None:
    config = json.loads('{"_class_name": "DPMSolverMultistepScheduler", "lambda_min_clipped": -Infinity}')
    assert Scheduler.from_config(config).solver == "dpmpp_2m"


def test_only_one_spacing_of_sigmas_is_asked_for() -> None:
    euler = {"_class_name": "EulerDiscreteScheduler"}
    off = {"use_exponential_sigmas": None, "use_beta_sigmas": False}
    assert Scheduler.from_config({**euler, "use_karras_sigmas": True, **off}).sigmas == "karras"
    for other in ({"use_beta_sigmas": True}, {"sigmas": "sgm_uniform"}):
        with pytest.raises(ConfigError, match=r"use_karras_sigmas.*exclude"):
            Scheduler.from_config({**euler, "use_karras_sigmas": True, **other})


def test_what_tells_other_classes_apart_is_left_over() -> None:
    left = {
        "algorithm_type": "sde-dpmsolver++",
        "solver_order": 3,
        "solver_type": "heun",
        "skip_prk_steps": False,
    }
    assert Scheduler.from_config({**SDXL, **left}) == Scheduler.from_config(SDXL)


@pytest.mark.parametrize("class_name", ["IPNDMScheduler", "os.system", None, 3, ["DDIMScheduler"]])
def test_other_classes_are_refused_with_the_list(class_name: Any) -> None:
    with pytest.raises(ConfigError, match="EulerDiscreteScheduler"):
        Scheduler.from_config({"_class_name": class_name})


BAD: dict[str, dict[str, list[object]]] = {
    "DDIMScheduler": {
        "beta_sched": ["linear"],
        "shift": [3.0],
        "beta_start": ["0.1", math.nan, -1.0],
        "beta_end": [10**400, math.inf],
        "beta_schedule": ["exp", None],
        "num_train_timesteps": [10.0, True, 10**12],
        "trained_betas": ["0.1", [0.1, None], []],
        "clip_sample": ["no", 1],
        "clip_sample_range": [-1.0],
        "thresholding": [None],
        "dynamic_thresholding_ratio": [2],
        "sample_max_value": [0.1],
        "prediction_type": ["flow", ["epsilon"], "flow_prediction"],
        "timestep_spacing": ["even"],
        "steps_offset": [-1, 1000],
        "set_alpha_to_one": ["true"],
        "final_sigmas_type": ["one"],
        "use_karras_sigmas": [0, None],
        "use_exponential_sigmas": [1],
        "use_beta_sigmas": ["true"],
        "sigmas": ["even", ["karras"]],
        "original_inference_steps": [0, 50.0],
        "timestep_scaling": [0.0, math.inf, "10"],
    },
    "FlowMatchEulerDiscreteScheduler": {
        "shift": [0.0, -1.0, "3", None, math.nan],
        "num_train_timesteps": [1],
        "base_shift": ["1"],
        "max_shift": [math.inf],
        "base_image_seq_len": [1.5],
        "use_karras_sigmas": [None],
        "shifts": [1.0],
        # Not implemented, as are those below.
        "use_dynamic_shifting": [True],
        "stochastic_sampling": [True],
        "invert_sigmas": [True],
        "shift_terminal": [0.02],
        "time_shift_type": ["cubic"],
    },
    "DPMSolverMultistepScheduler": {
        "algorithm_type": ["sde-dpmsolver"],
        "interpolation_type": ["log_linear"],
        "lambda_min_clipped": [-5.1],
        "sigma_min": [0.1],
        "solver_order": [1],
        "solver_type": ["heun"],
        "timestep_type": ["continuous"],
        "use_flow_sigmas": [True],
        "use_lu_lambdas": [True],
        "variance_type": ["learned_range"],
    },
    "UniPCMultistepScheduler": {
        "solver_type": ["bh1"],
        "solver_order": [3],
        "predict_x0": [False],
        "disable_corrector": [[0]],
        "solver_p": [{}],
    },
    "DPMSolverSinglestepScheduler": {"solver_order": [3]},
    "DPMSolverSDEScheduler": {"noise_sampler_seed": [1]},
    "DEISMultistepScheduler": {"algorithm_type": ["dpmsolver++"]},
    "PNDMScheduler": {"skip_prk_steps": ["yes"]},
}


@pytest.mark.parametrize(
    ("class_name", "key", "value"),
    [(name, key, value) for name, keys in BAD.items() for key, values in keys.items() for value in values],
)
def test_bad_values_are_refused_by_name(class_name: str, key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=key):
        Scheduler.from_config({"_class_name": class_name, key: value})
