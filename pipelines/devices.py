"""Where a pipeline runs, and in which dtype."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from latentgen.errors import InputError

DTypeName = Literal["auto", "float32", "float16", "bfloat16"]

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def resolve_device(device: str | torch.device) -> torch.device:
    """The device that was asked for; "auto" is the best one that the machine has.

    Raises:
        InputError: the name is not a device, or this machine has none of that kind.
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
        there = ", ".join(name for name, count in counts.items() if count)
        raise InputError(f'device={device!r} is not there; this machine has: {there}. "auto" takes the best')
    return resolved


def resolve_dtype(dtype: DTypeName | torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of the stages; "auto" is float16 on CUDA and float32 elsewhere.

    Raises:
        InputError: not one of float32, float16, bfloat16.
    """
    if dtype == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    resolved = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if resolved is None or resolved not in _DTYPES.values():
        raise InputError(f"dtype={dtype!r} is not supported; choose from auto, {', '.join(_DTYPES)}")
    return resolved


def dtype_of(module: nn.Module) -> torch.dtype:
    """The dtype of a module's weights; float32 if it has none."""
    return next((parameter.dtype for parameter in module.parameters()), torch.float32)
