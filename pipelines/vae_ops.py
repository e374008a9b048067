"""Encode images to latents, decode latents with a check for NaN, and convert images to arrays and PIL images."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from latentgen.errors import InputError, NumericalError
from latentgen.memory import MemoryPolicy, decode, on_device
from latentgen.models.pixels import ImageDecoder, ImageEncoder
from latentgen.models.vae import Gaussian, VAEDecoder, VAEEncoder
from latentgen.pipelines.images import for_each

Stage = TypeVar("Stage", VAEDecoder, VAEEncoder)


def decode_images(
    decoder: ImageDecoder, latents: Tensor, device: torch.device, memory: MemoryPolicy
) -> Tensor:
    """Decode float32 latents [B, C, h, w] to images [B, 3, H, W], nominally in -1..1.

    Stable Diffusion's decoder can overflow in float16; if its output has infinity or NaN, it runs again in float32.

    Raises:
        NumericalError: the images are not finite in float32 either.
    """
    dtype = dtype_of(decoder)
    latents = latents.contiguous(memory_format=torch.channels_last)
    with on_device(decoder, device, offload=memory.offload_idle):
        images = decode(decoder, latents.to(dtype), memory)
        if isinstance(decoder, VAEDecoder) and dtype != torch.float32 and not _finite(images):
            images = decode(_in_float32(decoder), latents, memory)
    if not _finite(images):
        raise NumericalError(
            "the decoder's output has NaN or infinity, even in float32, for finite latents; check the VAE's weights"
        )
    return images


def encode_images(encoder: ImageEncoder, images: Tensor, device: torch.device) -> Gaussian:
    """Encode images [B, 3, H, W] in -1..1, one by one, to the float32 distribution of their latents.

    The encoder is on the device only while it runs. Like the decoder it runs again in float32 if needed.

    Raises:
        NumericalError: the latents are not finite in float32 either.
    """
    dtype = dtype_of(encoder)
    images = images.to(device).contiguous(memory_format=torch.channels_last)
    with on_device(encoder, device, offload=True):
        posterior = _encode(encoder, images.to(dtype))
        if isinstance(encoder, VAEEncoder) and dtype != torch.float32 and not _finite(torch.stack(posterior)):
            posterior = _encode(_in_float32(encoder), images)
    if not _finite(torch.stack(posterior)):
        raise NumericalError(
            "the encoder's output has NaN or infinity, even in float32, for finite images; check the VAE's weights"
        )
    return posterior


def encode_for_each(encoder: ImageEncoder, images: Tensor, device: torch.device, count: int) -> Gaussian:
    """Encode images and repeat their distributions to `count` rows, the same number for each image."""
    mean, logvar = encode_images(encoder, images, device)
    return Gaussian(for_each(mean, count), for_each(logvar, count))


def _encode(encoder: ImageEncoder, images: Tensor) -> Gaussian:
    means, logvars = zip(*(encoder(image) for image in images.split(1)), strict=True)
    return Gaussian(torch.cat(means).float(), torch.cat(logvars).float())


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _in_float32(stage: Stage) -> Stage:
    """A copy, because other threads may be using the original."""
    with torch.device("meta"):
        copy = type(stage)(stage.config)
    copy.load_state_dict({name: tensor.float() for name, tensor in stage.state_dict().items()}, assign=True)
    copy.attention_backend = stage.attention_backend
    return copy.eval()


def dtype_of(module: nn.Module) -> torch.dtype:
    """The dtype of a module's weights; float32 if it has none."""
    return next((parameter.dtype for parameter in module.parameters()), torch.float32)


def to_unit(images: Tensor) -> Tensor:
    """Images [B, 3, H, W] in -1..1, of any float dtype, as float32 in 0..1 on the same device.

    Values outside -1..1 are clipped: a decoder overshoots a little at saturated colors.
    """
    return (images.float() / 2 + 0.5).clamp(0, 1)


def to_numpy(images: Tensor) -> np.ndarray:
    """Images [B, 3, H, W] in -1..1 as float32 [B, H, W, 3] in 0..1, clipped.

    Raises:
        InputError: not a tensor of this shape.
        NumericalError: the images have NaN or infinity.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise InputError(f"images must have the shape [B, 3, H, W], not {list(images.shape)}")
    if not images.isfinite().all():
        raise NumericalError("the images have NaN or infinity; decode them in float32")
    return unit_to_numpy(to_unit(images.detach()))


def to_pil(images: Tensor) -> list[Image.Image]:
    """Images [B, 3, H, W] in -1..1 as 8-bit RGB, rounded to the nearest level.

    Raises:
        InputError, NumericalError: as :func:`to_numpy`.
    """
    return numpy_to_pil(to_numpy(images))


def unit_to_numpy(images: Tensor) -> np.ndarray:
    """Images [B, 3, H, W] in 0..1 as an array [B, H, W, 3] of the same values."""
    return images.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def numpy_to_pil(images: np.ndarray) -> list[Image.Image]:
    """An array [B, H, W, 3] in 0..1 as 8-bit RGB, rounded to the nearest level."""
    return [Image.fromarray(levels) for levels in (images * 255).round().astype("uint8")]
