"""Checks of the arguments of a call; each function returns the checked value.

All raise InputError (OutputError for a path to write to), which names the argument, its value, what is allowed and the
fix.
"""

from __future__ import annotations

import numbers
import operator
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, SupportsIndex, TypeAlias, TypeVar, get_args

import torch
from torch import Tensor

from latentgen.diffusion.scheduler import Scheduler
from latentgen.errors import InputError, OutputError
from latentgen.files import quote
from latentgen.prompts import check_prompts

if TYPE_CHECKING:
    from diffusers.schedulers.scheduling_utils import SchedulerMixin


T = TypeVar("T")
OutputType = Literal["pil", "np", "pt", "latent"]

# The longest side of an image in pixels; its square is 64 megapixels.
MAX_SIDE = 8192
MAX_IMAGES_PER_PROMPT = 1024
MAX_MASK_BLUR = 256
MAX_SEED = 2**64 - 1
# More layers than any text encoder has; the encoder checks for its own number.
MAX_CLIP_SKIP = 1024
# Far above any useful value; keeps the arithmetic finite.
MAX_GUIDANCE_SCALE = 1e6


def as_prompts(name: str, prompts: str | Sequence[str]) -> tuple[str, ...]:
    """One prompt, or a non-empty sequence of them."""
    if isinstance(prompts, str):
        rows = (prompts,)
    elif isinstance(prompts, Sequence) and not isinstance(prompts, bytes):
        rows = tuple(prompts)
    else:
        raise InputError(f"{name} must be a str or a list of str, not {type(prompts).__name__}")
    if not rows:
        raise InputError(f'{name} is an empty list; pass at least one prompt ("" is allowed)')
    check_prompts(rows)
    return rows


def as_negative_prompts(negative_prompt: str | Sequence[str], count: int) -> tuple[str, ...]:
    """A negative prompt for each of `count` prompts; a single str is used for all."""
    negatives = as_prompts("negative_prompt", negative_prompt)
    if isinstance(negative_prompt, str):
        return negatives * count
    if len(negatives) != count:
        raise InputError(
            f"negative_prompt has {len(negatives)} entries for {count} prompts; pass one str or one for each"
        )
    return negatives


def check_integer(name: str, value: object, lowest: int, highest: int) -> int:
    """A whole number in `lowest`..`highest`; bools are refused."""
    number = _as_integer(value)
    if number is None:
        raise InputError(f"{name}={value!r} must be a whole number from {lowest} to {highest}")
    if not lowest <= number <= highest:
        raise InputError(f"{name}={number} is out of range; it must be from {lowest} to {highest}")
    return number


def check_guidance_scale(value: float, *, name: str = "guidance_scale", usual: float = 7.5) -> float:
    """A number from 0 to MAX_GUIDANCE_SCALE; up to 1 means no guidance."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise InputError(f"{name}={value!r} must be a number; {usual:g} is usual, 1 is no guidance")
    # Compare before the conversion, which overflows for large ints.
    if not 0 <= value <= MAX_GUIDANCE_SCALE:
        raise InputError(
            f"{name}={value} must be from 0 to {MAX_GUIDANCE_SCALE:g}; {usual:g} is usual, 1 is no guidance"
        )
    return float(value)


def check_fraction(name: str, value: float) -> float:
    """A number from 0 to 1: a fraction of the schedule."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 <= value <= 1:
        raise InputError(f"{name}={value!r} must be a number from 0 to 1, a fraction of the schedule")
    return float(value)


def check_side(name: str, value: int, multiple: int) -> int:
    """A side of the image in pixels: a multiple of `multiple`, up to MAX_SIDE."""
    highest = MAX_SIDE // multiple * multiple
    side = _as_integer(value)
    if side is None:
        raise InputError(f"{name}={value!r} must be a whole number of pixels, a multiple of {multiple}")
    if side % multiple == 0 and 0 < side <= highest:
        return side
    below = min(max(side // multiple * multiple, multiple), highest)
    above = min(max(below, multiple if side < multiple else below + multiple), highest)
    nearest = f"{below}" if below == above else f"{below} or {above}"
    raise InputError(
        f"{name}={side} must be a multiple of {multiple} from {multiple} to {highest}; nearest: {nearest}"
    )


def check_size(
    height: int | None, width: int | None, trained: int | tuple[int, int] | None, factor: int
) -> tuple[int, int]:
    """Height and width in pixels, multiples of `factor`; by default `trained`, in latents."""
    if trained is not None:
        trained_height, trained_width = trained if isinstance(trained, tuple) else (trained, trained)
        height = trained_height * factor if height is None else height
        width = trained_width * factor if width is None else width
    if height is None or width is None:
        raise InputError("pass height and width; the checkpoint does not say what size it was trained at")
    return check_side("height", height, factor), check_side("width", width, factor)


def check_blur(value: float) -> float:
    """The standard deviation in pixels of the blur of a mask."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 <= value <= MAX_MASK_BLUR:
        raise InputError(
            f"mask_blur={value!r} must be a number of pixels from 0 to {MAX_MASK_BLUR}; 4 is usual"
        )
    return float(value)


def check_seeds(seed: int | Sequence[int] | None, count: int) -> tuple[int, ...]:
    """The seeds of `count` images: consecutive from a number, a sequence as it is, or random."""
    if seed is None:
        first = secrets.randbits(32)
        return tuple(range(first, first + count))
    if isinstance(seed, Sequence) and not isinstance(seed, str | bytes):
        if len(seed) != count:
            raise InputError(
                f"seed has {len(seed)} entries for {count} images; pass one number or one for each image"
            )
        return tuple(check_integer(f"seed[{index}]", value, 0, MAX_SEED) for index, value in enumerate(seed))
    first = check_integer("seed", seed, 0, MAX_SEED + 1 - count)
    return tuple(range(first, first + count))


def check_latents(latents: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """Finite latents of `shape` [B, C, h, w], as float32."""
    if not isinstance(latents, Tensor) or not latents.is_floating_point():
        actual = latents.dtype if isinstance(latents, Tensor) else type(latents).__name__
        raise InputError(f"latents must be a floating-point tensor, not {actual}")
    if latents.is_meta:
        raise InputError("latents are on the meta device, without values; pass a tensor of noise")
    if latents.shape != shape:
        raise InputError(f"latents have shape {list(latents.shape)}; this call needs {list(shape)}")
    if not bool(torch.isfinite(latents).all()):
        raise InputError("latents have NaN or infinity; they must be finite")
    return latents.float()


def check_output_type(value: OutputType) -> OutputType:
    """One of the values of OutputType."""
    if value not in get_args(OutputType):
        raise InputError(f"output_type={value!r} is unknown; choose from {', '.join(get_args(OutputType))}")
    return value


def check_options(name: str, value: T | None, kind: type[T], example: str) -> T:
    """An options object of class `kind`; None is the defaults."""
    if value is None:
        return kind()
    if not isinstance(value, kind):
        raise InputError(f"{name}={value!r} must be a {kind.__name__}, such as {kind.__name__}({example})")
    return value


def output_folder(folder: str | Path) -> Path:
    """The path of a folder to write to; OutputError if it cannot be one."""
    if not isinstance(folder, str | Path) or not str(folder) or "\0" in str(folder):
        raise OutputError(
            f'cannot write to {quote(folder)}: pass the path of a folder; "." is the current one'
        )
    return Path(folder)


def _as_integer(value: object) -> int | None:
    """`value` as an int if it is a Python or numpy integer, else None; bools and floats are not."""
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


DTypeName = Literal["auto", "float32", "float16", "bfloat16"]

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def resolve_device(device: str | torch.device) -> torch.device:
    """The torch device; "auto" is CUDA if there is one, then MPS, then the CPU.

    Raises:
        InputError: not a device, or this machine does not have it.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError):
        raise InputError(
            f'device={device!r} is not a device; use "auto", "cpu", "cuda", "cuda:1" or "mps"'
        ) from None
    counts = {
        "cpu": 1,
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "mps": int(torch.backends.mps.is_available()),
    }
    if (resolved.index or 0) >= counts.get(resolved.type, 0):
        available = ", ".join(name for name, count in counts.items() if count)
        raise InputError(
            f'device={device!r} is not available; this machine has {available}; "auto" picks one'
        )
    return resolved


def resolve_dtype(dtype: DTypeName | torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of the weights; "auto" is float16 on CUDA and float32 elsewhere.

    Raises:
        InputError: not one of float32, float16, bfloat16.
    """
    if dtype == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    resolved = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if resolved is None or resolved not in _DTYPES.values():
        raise InputError(f"dtype={dtype!r} is not supported; choose from auto, {', '.join(_DTYPES)}")
    return resolved


# The scheduler of a call: the name of a solver, a Scheduler, or a diffusers scheduler.
AnyScheduler: TypeAlias = "str | Scheduler | SchedulerMixin"


def choose_scheduler(choice: AnyScheduler | None, own: Scheduler, *, is_sdxl: bool) -> Scheduler:
    """The scheduler of a call; a name replaces only the solver of the pipeline's own scheduler.

    Raises:
        InputError: an unknown solver, or not a scheduler.
        ConfigError: a diffusers scheduler that is not supported.
    """
    if choice is None:
        return own
    if isinstance(choice, str):
        chosen = own.with_solver(choice)
        aligned_to_sd = is_sdxl and chosen.sigmas == "align_your_steps"
        return replace(chosen, sigmas="align_your_steps_xl") if aligned_to_sd else chosen
    if isinstance(choice, Scheduler):
        return choice
    config = getattr(choice, "config", None)  # a diffusers scheduler, without importing diffusers
    if not isinstance(config, Mapping):
        raise InputError(
            f"scheduler must be a name, a Scheduler or a diffusers scheduler, not {type(choice).__name__}"
        )
    return Scheduler.from_config({**config, "_class_name": type(choice).__name__})
