"""Checks of the arguments of a call; each function returns the checked value.

All raise InputError, which names the argument, its value, what is allowed and the fix.
"""

from __future__ import annotations

import numbers
import operator
import secrets
from collections.abc import Sequence
from typing import Any, Literal, TypeVar, cast, get_args

import torch
from torch import Tensor

from latentgen.errors import InputError
from latentgen.prompts import check_prompts

T = TypeVar("T")
OutputType = Literal["pil", "np", "pt", "latent"]

# The longest side of an image in pixels; its square is 64 megapixels.
MAX_SIDE = 8192
MAX_IMAGES_PER_PROMPT = 1024
MAX_SEED = 2**64 - 1
# More layers than any text encoder has; the encoder checks for its own number.
MAX_CLIP_SKIP = 1024
# Far above any useful value; keeps the arithmetic finite.
MAX_GUIDANCE_SCALE = 1e6


def as_prompts(name: str, prompts: str | Sequence[str]) -> tuple[str, ...]:
    """One prompt, or a non-empty sequence of them."""
    if isinstance(prompts, bytes) or not isinstance(prompts, Sequence):
        raise InputError(f"{name} must be a str or a list of str, not {type(prompts).__name__}")
    rows = (prompts,) if isinstance(prompts, str) else tuple(prompts)
    if not rows:
        raise InputError(f'{name} is an empty list; pass at least one prompt ("" is allowed)')
    check_prompts(rows)
    return rows


def match_count(name: str, rows: tuple[T, ...], count: int) -> tuple[T, ...]:
    """One row for each of `count` prompts; a single one is used for all."""
    if len(rows) not in (1, count):
        raise InputError(f"{name} has {len(rows)} entries for {count} prompts; pass one or one for each")
    return rows * count if len(rows) == 1 else rows


def check_integer(name: str, value: Any, lowest: int, highest: int, hint: str = "") -> int:
    """A whole number in `lowest`..`highest`, of Python or numpy; bools are refused."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or not lowest <= number <= highest:
        raise InputError(f"{name}={value!r} must be a whole number from {lowest} to {highest}{hint}")
    return number


def check_number(name: str, value: Any, lowest: float, highest: float, hint: str) -> float:
    """A number in `lowest`..`highest`; bools and NaN are refused."""
    if (
        isinstance(value, bool)
        or not isinstance(value, numbers.Real)
        or not lowest <= cast(float, value) <= highest
    ):
        raise InputError(f"{name}={value!r} must be a number from {lowest:g} to {highest:g}; {hint}")
    return float(value)


def check_guidance_scale(value: float, *, name: str = "guidance_scale", usual: float = 7.5) -> float:
    """A number from 0 to MAX_GUIDANCE_SCALE; up to 1 means no guidance."""
    return check_number(name, value, 0, MAX_GUIDANCE_SCALE, f"{usual:g} is usual, 1 is no guidance")


def check_fraction(name: str, value: float) -> float:
    """A number from 0 to 1: a fraction of the schedule."""
    return check_number(name, value, 0, 1, "it is a fraction of the schedule")


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
    for name, side in (("height", height), ("width", width)):
        side = check_integer(name, side, factor, MAX_SIDE // factor * factor, f", a multiple of {factor}")
        if side % factor:
            below = side // factor * factor
            raise InputError(
                f"{name}={side} must be a multiple of {factor}, such as {below} or {below + factor}"
            )
    return int(height), int(width)


def check_seeds(seed: int | Sequence[int] | None, count: int) -> tuple[int, ...]:
    """The seeds of `count` images: consecutive ones from a number, the ones of a sequence, or random ones."""
    if isinstance(seed, Sequence) and not isinstance(seed, str | bytes):
        if len(seed) != count:
            raise InputError(
                f"seed has {len(seed)} entries for {count} images; pass one number or one for each image"
            )
        return tuple(check_integer(f"seed[{index}]", value, 0, MAX_SEED) for index, value in enumerate(seed))
    if seed is None:
        seed = secrets.randbits(32)
    first = check_integer("seed", seed, 0, MAX_SEED + 1 - count)
    return tuple(range(first, first + count))


def check_tensor(name: str, tensor: object, layout: str, shape: Sequence[int | None]) -> Tensor:
    """A finite floating-point tensor of a shape, in which None is any size above 0; `layout` is for the error."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.is_meta:
        is_tensor = isinstance(tensor, Tensor)
        actual = f"{tensor.dtype} on {tensor.device}" if is_tensor else type(tensor).__name__
        raise InputError(f"{name} must be a floating-point tensor {layout} with values, not {actual}")
    matches = tensor.ndim == len(shape) and all(
        size == expected if expected is not None else size > 0
        for size, expected in zip(tensor.shape, shape, strict=True)
    )
    if not matches:
        expected = ", ".join("any" if size is None else str(size) for size in shape)
        raise InputError(f"{name} {layout} has the shape {list(tensor.shape)}; this call needs [{expected}]")
    if not bool(torch.isfinite(tensor).all()):
        raise InputError(f"{name} has NaN or infinity; it must be finite")
    return tensor


def check_output_type(value: OutputType) -> OutputType:
    """One of the values of OutputType."""
    if value not in get_args(OutputType):
        raise InputError(f"output_type={value!r} is unknown; choose from {', '.join(get_args(OutputType))}")
    return value


def check_options(name: str, value: T | None, kind: type[T], hint: str = "") -> T | None:
    """An options object of class `kind`, or None."""
    if value is not None and not isinstance(value, kind):
        raise InputError(f"{name}={value!r} must be a {kind.__name__}{hint}")
    return value
