"""The arguments of a call, checked before anything is computed; each function returns what it accepted.

All raise InputError (for a path to write, OutputError), which names the argument, what was found, what is
allowed and the fix.
"""

from __future__ import annotations

import numbers
import operator
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, SupportsIndex, get_args

import torch
from torch import Tensor

from latentgen.errors import InputError, OutputError
from latentgen.files import quote
from latentgen.pipelines.conditioning import SizeConditioning
from latentgen.pipelines.guiding import GuidanceOptions
from latentgen.prompts import check_prompts

OutputType = Literal["pil", "np", "pt", "latent"]

# The side of the largest image, in pixels; a square of it has the 64 megapixels that no image may exceed.
MAX_SIDE = 8192
MAX_IMAGES_PER_PROMPT = 1024
MAX_MASK_BLUR = 256
MAX_SEED = 2**64 - 1
# The layers of any text encoder; the encoder itself says how many it can spare.
MAX_CLIP_SKIP = 1024
# Far beyond any use; it keeps the arithmetic finite.
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
        raise InputError(f'{name} is an empty list; give at least one prompt ("" is allowed)')
    check_prompts(rows)
    return rows


def as_negative_prompts(negative_prompt: str | Sequence[str], count: int) -> tuple[str, ...]:
    """One negative prompt for all of `count` prompts, or one for each."""
    negatives = as_prompts("negative_prompt", negative_prompt)
    if isinstance(negative_prompt, str):
        return negatives * count
    if len(negatives) != count:
        raise InputError(
            f"negative_prompt has {len(negatives)} entries for {count} prompts; give one str or one for each"
        )
    return negatives


def check_integer(name: str, value: object, lowest: int, highest: int) -> int:
    """A whole number in `lowest`..`highest`; bools are no numbers here."""
    number = _as_integer(value)
    if number is None:
        raise InputError(f"{name}={value!r} must be a whole number from {lowest} to {highest}")
    if not lowest <= number <= highest:
        raise InputError(f"{name}={number} is out of bounds; it must be from {lowest} to {highest}")
    return number


def check_guidance_scale(value: float, *, name: str = "guidance_scale", usual: float = 7.5) -> float:
    """A number from 0 to MAX_GUIDANCE_SCALE; up to 1 means no guidance."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise InputError(f"{name}={value!r} must be a number; {usual:g} is usual, 1 is no guidance")
    # Compared before the conversion, which overflows for whole numbers beyond the range of a float.
    if not 0 <= value <= MAX_GUIDANCE_SCALE:
        raise InputError(
            f"{name}={value} must be from 0 to {MAX_GUIDANCE_SCALE:g}; {usual:g} is usual, 1 is no guidance"
        )
    return float(value)


def check_share(name: str, value: float) -> float:
    """A number from 0 to 1: how much of the schedule."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 <= value <= 1:
        raise InputError(f"{name}={value!r} must be a number from 0 to 1, a share of the schedule")
    return float(value)


def check_side(name: str, value: int, multiple: int) -> int:
    """A side of the image in pixels: a multiple of what one latent covers, up to MAX_SIDE."""
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
    """Height and width in pixels, multiples of `factor`; by default `trained`, which counts latents."""
    if trained is not None:
        trained_height, trained_width = trained if isinstance(trained, tuple) else (trained, trained)
        height = trained_height * factor if height is None else height
        width = trained_width * factor if width is None else width
    if height is None or width is None:
        raise InputError("give height and width; the checkpoint does not say at which size it was trained")
    return check_side("height", height, factor), check_side("width", width, factor)


def check_blur(value: float) -> float:
    """How far the border of a mask is softened, in pixels."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 <= value <= MAX_MASK_BLUR:
        raise InputError(
            f"mask_blur={value!r} must be a number of pixels from 0 to {MAX_MASK_BLUR}; 4 is usual"
        )
    return float(value)


def check_seeds(seed: int | Sequence[int] | None, count: int) -> tuple[int, ...]:
    """The seeds of `count` images: counted up from one number, or the sequence itself, or drawn at random."""
    if seed is None:
        first = secrets.randbits(32)
        return tuple(range(first, first + count))
    if isinstance(seed, Sequence) and not isinstance(seed, str | bytes):
        if len(seed) != count:
            raise InputError(
                f"seed has {len(seed)} entries for {count} images; give one number or one for each image"
            )
        return tuple(check_integer(f"seed[{index}]", value, 0, MAX_SEED) for index, value in enumerate(seed))
    first = check_integer("seed", seed, 0, MAX_SEED + 1 - count)
    return tuple(range(first, first + count))


def check_latents(latents: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """Standard normal noise of `shape` [B, C, h, w], finite, in place of what the seeds draw."""
    if not isinstance(latents, Tensor) or not latents.is_floating_point():
        found = latents.dtype if isinstance(latents, Tensor) else type(latents).__name__
        raise InputError(f"latents must be a floating-point tensor, not {found}")
    if latents.is_meta:
        raise InputError("latents stand on the meta device and hold no values; give a tensor of noise")
    if latents.shape != shape:
        raise InputError(f"latents have shape {list(latents.shape)}; this call needs {list(shape)}")
    if not bool(torch.isfinite(latents).all()):
        raise InputError("latents hold NaN or infinity; they must be finite")
    return latents.float()


def check_output_type(value: OutputType) -> OutputType:
    """One of the kinds of output."""
    if value not in get_args(OutputType):
        raise InputError(f"output_type={value!r} is not known; choose from {', '.join(get_args(OutputType))}")
    return value


def check_size_conditioning(value: SizeConditioning | None) -> SizeConditioning:
    """What SDXL is told of sizes; by default those of the image."""
    if value is None:
        return SizeConditioning()
    if not isinstance(value, SizeConditioning):
        raise InputError(
            f"size_conditioning={value!r} must be a SizeConditioning, such as "
            "SizeConditioning(original_size=(1024, 1024))"
        )
    return value


def check_guidance_options(value: GuidanceOptions | None) -> GuidanceOptions:
    """The options of guidance; by default none is used."""
    if value is None:
        return GuidanceOptions()
    if not isinstance(value, GuidanceOptions):
        raise InputError(
            f"guidance={value!r} must be GuidanceOptions, such as GuidanceOptions(rescale=0.7); the scale is "
            "guidance_scale"
        )
    return value


def output_folder(folder: str | Path) -> Path:
    """The path of a folder to write; OutputError if it cannot be one."""
    if not isinstance(folder, str | Path) or not str(folder) or "\0" in str(folder):
        raise OutputError(
            f'cannot write to {quote(folder)}: give the path of a folder; "." is the current one'
        )
    return Path(folder)


def _as_integer(value: object) -> int | None:
    """The number, if `value` is a whole one of Python or numpy; a bool or a float is none."""
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None
