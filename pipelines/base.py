"""What the pipelines share before and after denoising: where they run, decoding, and results."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from latentgen.errors import InputError, NumericalError
from latentgen.image import to_numpy, to_pil, to_unit
from latentgen.memory import MemoryPolicy, decode, resident
from latentgen.models.vae import VAEDecoder
from latentgen.pipelines.arguments import OutputType

DTypeName = Literal["auto", "float32", "float16", "bfloat16"]
Images = list[Image.Image] | np.ndarray | Tensor

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Output(NamedTuple):
    """What a call gives.

    Attributes:
        images: what `output_type` asked for: "pil" a list of images, "np" float32 [B, H, W, 3] in 0..1, "pt"
            float32 [B, 3, H, W] in 0..1 on the device, "latent" float32 [B, C, h, w] on the device. Prompts
            come in their order, the images of one prompt together.
        seeds: the seed of each image, which alone makes that image again.
    """

    images: Images
    seeds: tuple[int, ...]


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


def decode_images(decoder: VAEDecoder, latents: Tensor, device: torch.device, memory: MemoryPolicy) -> Tensor:
    """Decode float32 latents [B, C, h, w] to images [B, 3, H, W], nominally in -1..1.

    The decoder of Stable Diffusion can overflow in float16; if it gives infinity or NaN, it runs once more in
    float32.

    Raises:
        NumericalError: the images are not finite in float32 either.
    """
    dtype = next(decoder.parameters()).dtype
    latents = latents.contiguous(memory_format=torch.channels_last)
    with resident(decoder, device, offload=memory.offload_idle):
        images = decode(decoder, latents.to(dtype), memory)
        if dtype != torch.float32 and not _finite(images):
            images = decode(_in_float32(decoder), latents, memory)
    if not _finite(images):
        raise NumericalError(
            "the decoder gave NaN or infinity, even in float32, for finite latents; check the VAE's weights"
        )
    return images


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _in_float32(decoder: VAEDecoder) -> VAEDecoder:
    """A copy, because other threads may be decoding with the original."""
    with torch.device("meta"):
        copy = VAEDecoder(decoder.config)
    copy.load_state_dict({name: tensor.float() for name, tensor in decoder.state_dict().items()}, assign=True)
    copy.attention_backend = decoder.attention_backend
    return copy.eval()


def export(images: Tensor, output_type: OutputType) -> Images:
    """Turn images [B, 3, H, W] in -1..1 into what `output_type` names."""
    match output_type:
        case "pil":
            return to_pil(images)
        case "np":
            return to_numpy(images)
        case "pt":
            return to_unit(images)
        case "latent":
            return images
