"""``scheduler_config.json`` in and out: diffusers' class names and keys, checked one by one.

A file may contain keys of other classes, as diffusers writes them after a change of scheduler; they are kept for a
later change of solver. Unknown keys and features that are not implemented are errors.
"""

from __future__ import annotations

import math
import reprlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from latentgen.diffusion.flow_matching import FlowSchedule
from latentgen.diffusion.prediction import Clipping
from latentgen.diffusion.schedule import NoiseSchedule
from latentgen.diffusion.solver_names import SIGMAS, SOLVER_TABLE, SolverName
from latentgen.errors import ConfigError

_SCHEDULE_KEYS = tuple(item.name for item in fields(NoiseSchedule))
_CLIPPING_KEYS = tuple(item.name for item in fields(Clipping))
_ZERO_SNR = ("rescale_betas_zero_snr",)
_FLOW_KEYS = tuple(item.name for item in fields(FlowSchedule))
_SHARED_KEYS = (*(key for key in _SCHEDULE_KEYS if key not in _ZERO_SNR), "prediction_type", "steps_offset")
_DISTILLED_KEYS = (
    *_CLIPPING_KEYS,
    *_ZERO_SNR,
    "set_alpha_to_one",
    "original_inference_steps",
    "timestep_scaling",
)
# Those of Stable Diffusion, but for beta_schedule.
_DISCRETE_DEFAULTS: dict[str, object] = {"beta_start": 0.00085, "beta_end": 0.012}
_DISTILLED_DEFAULTS = _DISCRETE_DEFAULTS | {"beta_schedule": "scaled_linear"}
_THRESHOLDING_KEYS = tuple(key for key in _CLIPPING_KEYS if not key.startswith("clip_"))
_SIGMAS_FLAGS = {names.flag: sigmas for sigmas, names in SIGMAS.items() if names.flag}
_DPMPP_KEYS = (
    *_THRESHOLDING_KEYS,
    *_ZERO_SNR,
    *_SIGMAS_FLAGS,
    "final_sigmas_type",
    "lower_order_final",
    "euler_at_final",
)


@dataclass(frozen=True)
class _Entry:
    """How a class of diffusers configures a solver.

    keys: of the class, besides the shared ones.
    defaults: of the class, where they differ from ours.
    variant: the values that distinguish the solver from others of the same class.
    is_flow: its schedule is a FlowSchedule.
    """

    keys: tuple[str, ...] = ()
    defaults: dict[str, object] = field(default_factory=dict)
    variant: dict[str, object] = field(default_factory=dict)
    shared: tuple[str, ...] = _SHARED_KEYS
    is_flow: bool = False


def _dpmpp(algorithm_type: str, solver_order: int) -> dict[str, object]:
    return {"algorithm_type": algorithm_type, "solver_order": solver_order, "solver_type": "midpoint"}


# A file without the keys that distinguish the solvers of a class means the first of them.
_ENTRIES: dict[SolverName, _Entry] = {
    "ddpm": _Entry((*_CLIPPING_KEYS, *_ZERO_SNR), {"clip_sample": True}),
    "ddim": _Entry((*_CLIPPING_KEYS, *_ZERO_SNR, "set_alpha_to_one"), {"clip_sample": True}),
    "pndm_prk": _Entry(("set_alpha_to_one",), {"set_alpha_to_one": False}, {"skip_prk_steps": False}),
    "pndm": _Entry(("set_alpha_to_one",), {"set_alpha_to_one": False}, {"skip_prk_steps": True}),
    "euler": _Entry((*_ZERO_SNR, *_SIGMAS_FLAGS, "final_sigmas_type")),
    "euler_ancestral": _Entry(_ZERO_SNR),
    "heun": _Entry((*_SIGMAS_FLAGS, "clip_sample", "clip_sample_range"), _DISCRETE_DEFAULTS),
    "dpm2": _Entry(tuple(_SIGMAS_FLAGS), _DISCRETE_DEFAULTS),
    "dpm2_ancestral": _Entry(tuple(_SIGMAS_FLAGS), _DISCRETE_DEFAULTS),
    "lms": _Entry(tuple(_SIGMAS_FLAGS)),
    "dpmpp_2m": _Entry(_DPMPP_KEYS, variant=_dpmpp("dpmsolver++", 2)),
    "dpmpp_2m_sde": _Entry(_DPMPP_KEYS, variant=_dpmpp("sde-dpmsolver++", 2)),
    "dpmpp_3m": _Entry(_DPMPP_KEYS, variant=_dpmpp("dpmsolver++", 3)),
    "dpmpp_3m_sde": _Entry(_DPMPP_KEYS, variant=_dpmpp("sde-dpmsolver++", 3)),
    "dpmpp_2s": _Entry(
        (*_THRESHOLDING_KEYS, *_SIGMAS_FLAGS, "final_sigmas_type", "lower_order_final"),
        {"lower_order_final": False},
        _dpmpp("dpmsolver++", 2),
    ),
    "dpmpp_sde": _Entry(tuple(_SIGMAS_FLAGS), _DISCRETE_DEFAULTS),
    "deis": _Entry(
        (*_THRESHOLDING_KEYS, *_SIGMAS_FLAGS, "lower_order_final"),
        variant={"algorithm_type": "deis", "solver_order": 2, "solver_type": "logrho"},
    ),
    "unipc": _Entry(
        (*_THRESHOLDING_KEYS, *_ZERO_SNR, *_SIGMAS_FLAGS, "final_sigmas_type", "lower_order_final"),
        variant={"solver_order": 2, "solver_type": "bh2"},
    ),
    "lcm": _Entry(_DISTILLED_KEYS, _DISTILLED_DEFAULTS),
    "tcd": _Entry(_DISTILLED_KEYS, _DISTILLED_DEFAULTS),
    "flow_euler": _Entry(
        tuple(_SIGMAS_FLAGS), {"prediction_type": "flow_prediction"}, shared=_FLOW_KEYS, is_flow=True
    ),
}

Reader = Callable[[str, object], Any]
_ALLOWED = {bool: "true or false", int: "a whole number", float: "a finite number", str: "a string"}


def _wrong(key: str, value: object, allowed: str) -> ConfigError:
    return ConfigError(f"scheduler config: {key} is {reprlib.repr(value)}; allowed is {allowed}")


def _typed(kind: type) -> Reader:
    """A reader of one type. Whole numbers are accepted as floats; true and false are not accepted as numbers."""

    def read(key: str, value: object) -> object:
        if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
            if abs(value) <= sys.float_info.max:
                return float(value)
        elif type(value) is kind:
            return value
        raise _wrong(key, value, _ALLOWED[kind])

    return read


def _or_null(read: Reader, default: object = None) -> Reader:
    return lambda key, value: default if value is None else read(key, value)


_flag, _integer, _number, _text = map(_typed, (bool, int, float, str))


def _betas(key: str, value: object) -> tuple[float, ...]:
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


_FLAGS = (
    *("rescale_betas_zero_snr", "clip_sample", "thresholding", "use_karras_sigmas", "set_alpha_to_one"),
    *("lower_order_final", "euler_at_final"),
)
_NUMBERS = (
    *("beta_start", "beta_end", "clip_sample_range", "dynamic_thresholding_ratio", "sample_max_value"),
    "timestep_scaling",
)
_READERS: dict[str, Reader] = {
    **dict.fromkeys(_FLAGS, _flag),
    **dict.fromkeys(("use_exponential_sigmas", "use_beta_sigmas"), _or_null(_flag, False)),
    **dict.fromkeys(("num_train_timesteps", "steps_offset", "original_inference_steps"), _integer),
    **dict.fromkeys(_NUMBERS, _number),
    **dict.fromkeys(("beta_schedule", "prediction_type", "timestep_spacing", "final_sigmas_type"), _text),
    "sigmas": _or_null(_text),
    "trained_betas": _or_null(_betas),
}

# Of flow matching only.
_FLOW_READERS: dict[str, Reader] = {"shift": _number}

# Keys that have no effect at these values; other values are features that are not implemented. Those that distinguish
# the solvers of one class may remain in files of the others.
_UNIMPLEMENTED: dict[str, Reader] = {
    "algorithm_type": _only("dpmsolver++", "sde-dpmsolver++", "deis"),
    "disable_corrector": _only([]),
    "flow_shift": _only(1.0),
    "invert_sigmas": _only(False),
    "interpolation_type": _only("linear"),
    "lambda_min_clipped": _only(-math.inf, None),
    "noise_sampler_seed": _only(None),
    "predict_x0": _only(True),
    "shift_terminal": _only(None),
    "sigma_max": _only(None),
    "sigma_min": _only(None),
    "skip_prk_steps": _only(True, False),
    "solver_p": _only(None),
    "solver_order": _only(1, 2, 3),
    "solver_type": _only("midpoint", "heun", "logrho", "bh1", "bh2"),
    "stochastic_sampling": _only(False),
    "timestep_type": _only("discrete"),
    "use_dynamic_shifting": _only(False),
    # Options of dynamic shifting.
    "base_image_seq_len": _integer,
    "base_shift": _or_null(_number),
    "max_image_seq_len": _integer,
    "max_shift": _or_null(_number),
    "time_shift_type": _only("exponential", "linear"),
    "use_flow_sigmas": _only(False),
    "use_lu_lambdas": _only(False),
    # Both are the small variance of DDPM; they differ in the way diffusers computes it.
    "variance_type": _only(None, "fixed_small", "fixed_small_log"),
}


def read(config: Mapping[str, object]) -> dict[str, Any]:
    """Check a config key by key, and return the fields of the Scheduler. Raises ConfigError."""
    solver = _identify(config)
    is_flow = _ENTRIES[solver].is_flow
    readers = _READERS | (_FLOW_READERS if is_flow else {})
    values: dict[str, Any] = dict(_ENTRIES[solver].defaults)
    for key, value in config.items():
        if key.startswith("_"):
            continue
        if key in _UNIMPLEMENTED:
            _UNIMPLEMENTED[key](key, value)
        elif key in readers:
            values[key] = readers[key](key, value)
        else:
            raise ConfigError(f"scheduler config: unknown key {key!r}; remove it, or correct its name")
    if "timestep_spacing" in values:
        values["spacing"] = values.pop("timestep_spacing")
    flags = [flag for flag in _SIGMAS_FLAGS if values.pop(flag, False)]
    if len(flags) + (values.get("sigmas") is not None) > 1:
        raise ConfigError(
            f"scheduler config: {' and '.join(flags)} exclude each other and sigmas; set one of them"
        )
    if flags:
        values["sigmas"] = _SIGMAS_FLAGS[flags[0]]
    if is_flow:
        values["prediction_type"] = prediction_type(config)
    levels = {key: values.pop(key) for key in {*_SCHEDULE_KEYS, *_FLOW_KEYS} if key in values}
    if is_flow:
        schedule = FlowSchedule(**{key: levels[key] for key in _FLOW_KEYS if key in levels})
    else:
        schedule = NoiseSchedule(**levels)
    clipping = Clipping(**{key: values.pop(key) for key in _CLIPPING_KEYS if key in values})
    return {"solver": solver, "schedule": schedule, "clipping": clipping, **values}


def prediction_type(config: Mapping[str, object]) -> object:
    """The prediction type of a config, not validated; the class of flow matching has only one."""
    flow = [SOLVER_TABLE[solver].diffusers_class for solver, entry in _ENTRIES.items() if entry.is_flow]
    return (
        "flow_prediction" if config.get("_class_name") in flow else config.get("prediction_type", "epsilon")
    )


def knows_zero_snr(solver: SolverName) -> bool:
    """Whether the class of a solver in diffusers has rescale_betas_zero_snr."""
    return set(_ZERO_SNR) <= set(_ENTRIES[solver].keys)


def _identify(config: Mapping[str, object]) -> SolverName:
    class_name = config.get("_class_name")
    solvers: list[SolverName] = [
        solver for solver in _ENTRIES if SOLVER_TABLE[solver].diffusers_class == class_name
    ]
    if not solvers:
        known = ", ".join(dict.fromkeys(names.diffusers_class for names in SOLVER_TABLE.values()))
        raise ConfigError(f"scheduler config: _class_name is {reprlib.repr(class_name)}; known are {known}")
    defaults = _ENTRIES[solvers[0]].variant
    for key in defaults:
        allowed = dict.fromkeys(_ENTRIES[solver].variant[key] for solver in solvers)
        _only(*allowed)(key, config.get(key, defaults[key]))
    meant = {key: config.get(key, default) for key, default in defaults.items()}
    return next(solver for solver in solvers if _ENTRIES[solver].variant == meant)


def _with_flags(values: Mapping[str, object]) -> dict[str, object]:
    """The sigmas as diffusers' flags, if it has one for them."""
    sigmas = values["sigmas"]
    flags = {flag: sigmas == flagged for flag, flagged in _SIGMAS_FLAGS.items()}
    return {**values, "sigmas": None if any(flags.values()) else sigmas, **flags}


def write(
    solver: SolverName, values: Mapping[str, object], defaults: Mapping[str, object]
) -> dict[str, object]:
    """The config of a solver's class in diffusers: its own keys, and others that differ from the defaults.

    values contains every field, defaults the value of each that a file leaves out.
    """
    values, defaults = _with_flags(values), _with_flags(defaults)
    entry = _ENTRIES[solver]
    own = {*entry.shared, *entry.keys}
    defaults = {**defaults, **entry.defaults}
    written = {key: value for key, value in values.items() if key in own or value != defaults[key]}
    return {"_class_name": SOLVER_TABLE[solver].diffusers_class, **entry.variant, **written}
