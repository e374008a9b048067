"""``scheduler_config.json`` in and out: diffusers' class names and keys, checked one by one.

A file may hold keys of other classes than its own, as diffusers writes them after a change of scheduler; they
are kept for a later change of solver. A key that no class knows fails, and so does a feature that is not
implemented.
"""

from __future__ import annotations

import math
import reprlib
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from latentgen.diffusion.prediction import Clipping
from latentgen.diffusion.schedule import NoiseSchedule
from latentgen.diffusion.solvers import SolverName
from latentgen.errors import ConfigError

_SCHEDULE_KEYS = tuple(item.name for item in fields(NoiseSchedule))
_CLIPPING_KEYS = tuple(item.name for item in fields(Clipping))
_SHARED_KEYS = (*_SCHEDULE_KEYS, "prediction_type", "steps_offset")
_DISTILLED_KEYS = (*_CLIPPING_KEYS, "set_alpha_to_one", "original_inference_steps", "timestep_scaling")
_DISTILLED_DEFAULTS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_THRESHOLDING_KEYS = tuple(key for key in _CLIPPING_KEYS if not key.startswith("clip_"))


@dataclass(frozen=True)
class _SchedulerClass:
    """A class of diffusers: its solver here, the keys of its own, and where its defaults depart from ours."""

    solver: SolverName
    keys: tuple[str, ...] = ()
    defaults: dict[str, object] = field(default_factory=dict)


_CLASSES: dict[str, _SchedulerClass] = {
    "DDPMScheduler": _SchedulerClass("ddpm", _CLIPPING_KEYS, {"clip_sample": True}),
    "DDIMScheduler": _SchedulerClass("ddim", (*_CLIPPING_KEYS, "set_alpha_to_one"), {"clip_sample": True}),
    "EulerDiscreteScheduler": _SchedulerClass("euler", ("use_karras_sigmas", "final_sigmas_type")),
    "EulerAncestralDiscreteScheduler": _SchedulerClass("euler_ancestral"),
    "DPMSolverMultistepScheduler": _SchedulerClass(
        "dpmpp_2m",
        (
            *_THRESHOLDING_KEYS,
            "use_karras_sigmas",
            "final_sigmas_type",
            "lower_order_final",
            "euler_at_final",
        ),
    ),
    "LCMScheduler": _SchedulerClass("lcm", _DISTILLED_KEYS, _DISTILLED_DEFAULTS),
    "TCDScheduler": _SchedulerClass("tcd", _DISTILLED_KEYS, _DISTILLED_DEFAULTS),
}
_PNDM = "PNDMScheduler"
_PNDM_DEFAULTS: dict[str, object] = {"set_alpha_to_one": False}

Reader = Callable[[str, object], Any]


def _wrong(key: str, value: object, allowed: str) -> ConfigError:
    return ConfigError(f"scheduler config: {key} is {reprlib.repr(value)}; allowed is {allowed}")


def _flag(key: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise _wrong(key, value, "true or false")
    return value


def _integer(key: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise _wrong(key, value, "a whole number")
    return value


def _number(key: str, value: object) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max:
        return float(value)
    raise _wrong(key, value, "a finite number")


def _text(key: str, value: object) -> str:
    if not isinstance(value, str):
        raise _wrong(key, value, "a string")
    return value


def _betas(key: str, value: object) -> tuple[float, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list | tuple):
        raise _wrong(key, value, "a list of numbers, or null")
    return tuple(_number(f"{key}[{index}]", beta) for index, beta in enumerate(value))


def _only(*allowed: object) -> Reader:
    def read(key: str, value: object) -> None:
        if value not in allowed:
            names = " or ".join("null" if item is None else repr(item) for item in allowed)
            raise ConfigError(
                f"scheduler config: {key} {reprlib.repr(value)} is not implemented; allowed is {names}"
            )

    return read


_READERS: dict[str, Reader] = {
    "num_train_timesteps": _integer,
    "beta_start": _number,
    "beta_end": _number,
    "beta_schedule": _text,
    "trained_betas": _betas,
    "rescale_betas_zero_snr": _flag,
    "clip_sample": _flag,
    "clip_sample_range": _number,
    "thresholding": _flag,
    "dynamic_thresholding_ratio": _number,
    "sample_max_value": _number,
    "prediction_type": _text,
    "timestep_spacing": _text,
    "steps_offset": _integer,
    "use_karras_sigmas": _flag,
    "set_alpha_to_one": _flag,
    "final_sigmas_type": _text,
    "lower_order_final": _flag,
    "euler_at_final": _flag,
    "original_inference_steps": _integer,
    "timestep_scaling": _number,
}

# Keys that change nothing at these values; at any other they ask for a feature that is not there.
_UNIMPLEMENTED: dict[str, Reader] = {
    "algorithm_type": _only("dpmsolver++"),
    "flow_shift": _only(1.0),
    "interpolation_type": _only("linear"),
    "lambda_min_clipped": _only(-math.inf, None),
    "sigma_max": _only(None),
    "sigma_min": _only(None),
    "skip_prk_steps": _only(True, False),
    "solver_order": _only(2),
    "solver_type": _only("midpoint"),
    "time_shift_type": _only("exponential"),
    "timestep_type": _only("discrete"),
    "use_beta_sigmas": _only(False, None),
    "use_dynamic_shifting": _only(False),
    "use_exponential_sigmas": _only(False, None),
    "use_flow_sigmas": _only(False),
    "use_lu_lambdas": _only(False),
    # Both are the small variance of DDPM; they differ in the way diffusers computes it.
    "variance_type": _only(None, "fixed_small", "fixed_small_log"),
}


class SchedulerFields(NamedTuple):
    """What a file says, as the arguments of the dataclasses that hold it."""

    solver: SolverName
    schedule: dict[str, Any]
    clipping: dict[str, Any]
    scheduler: dict[str, Any]


def read(config: Mapping[str, object]) -> SchedulerFields:
    """Check a config key by key. Raises ConfigError; warns where a PNDMScheduler becomes DDIM."""
    solver, defaults = _identify(config.get("_class_name"))
    values = dict(defaults)
    for key, value in config.items():
        if key.startswith("_"):
            continue
        if key in _UNIMPLEMENTED:
            _UNIMPLEMENTED[key](key, value)
        elif key in _READERS:
            values[key] = _READERS[key](key, value)
        else:
            raise ConfigError(
                f"scheduler config: the key {key!r} is not known; remove it, or correct its name"
            )
    if "timestep_spacing" in values:
        values["spacing"] = values.pop("timestep_spacing")
    return SchedulerFields(
        solver,
        schedule={key: values.pop(key) for key in _SCHEDULE_KEYS if key in values},
        clipping={key: values.pop(key) for key in _CLIPPING_KEYS if key in values},
        scheduler=values,
    )


def _identify(class_name: object) -> tuple[SolverName, dict[str, object]]:
    if class_name == _PNDM:
        warnings.warn(
            "the checkpoint's PNDMScheduler is not implemented; its schedule is kept and sampled with 'ddim' "
            "(choose another with scheduler=...)",
            stacklevel=4,
        )
        return "ddim", _PNDM_DEFAULTS
    if not isinstance(class_name, str) or class_name not in _CLASSES:
        known = ", ".join((*_CLASSES, _PNDM))
        raise ConfigError(f"scheduler config: _class_name is {reprlib.repr(class_name)}; known are {known}")
    return _CLASSES[class_name].solver, _CLASSES[class_name].defaults


def write(
    solver: SolverName, values: Mapping[str, object], defaults: Mapping[str, object]
) -> dict[str, object]:
    """The config of the class that stands for a solver: the keys of its own, and others where not default.

    values holds every key, defaults what a file means that leaves one out.
    """
    class_name = next(name for name, known in _CLASSES.items() if known.solver == solver)
    known = _CLASSES[class_name]
    own = {*_SHARED_KEYS, *known.keys}
    defaults = {**defaults, **known.defaults}
    written = {key: value for key, value in values.items() if key in own or value != defaults[key]}
    return {"_class_name": class_name, **written}
