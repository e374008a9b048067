"""Decode latents to images, retrying when memory runs out or float16 overflows; convert images to arrays and PIL."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from latentgen.errors import NumericalError
from latentgen.memory import MemoryPolicy, is_out_of_memory, on_device, oom_hint, weight_bytes
from latentgen.models.pixels import ImageDecoder
from latentgen.models.vae import VAEDecoder, VAEEncoder
from latentgen.pipelines.tiles import in_tiles

VAEPart = TypeVar("VAEPart", VAEDecoder, VAEEncoder)

# Side of the tiles of the retry after running out of memory: 512 pixels at eight pixels a latent.
FALLBACK_TILE = 64


def decode_images(
    decoder: ImageDecoder, latents: Tensor, device: torch.device, memory: MemoryPolicy
) -> Tensor:
    """Decode float32 latents [B, C, h, w] to images [B, 3, H, W], nominally in -1..1.

    Stable Diffusion's decoder can overflow in float16; if its output has infinity or NaN, it runs again in float32.

    Raises:
        NumericalError: the images are not finite in float32 either.
        MemoryBudgetError: memory runs out, see :func:`decode`.
    """
    dtype = dtype_of(decoder)
    latents = latents.contiguous(memory_format=torch.channels_last)
    with on_device(decoder, device, offload=memory.offload_idle):
        images = decode(decoder, latents.to(dtype), memory)
        if isinstance(decoder, VAEDecoder) and dtype != torch.float32 and not is_finite(images):
            images = decode(in_float32(decoder), latents, memory)
    if not is_finite(images):
        raise NumericalError(
            "the decoder's output has NaN or infinity, even in float32, for finite latents; check the VAE's weights"
        )
    return images


def decode(decoder: ImageDecoder, latents: Tensor, policy: MemoryPolicy) -> Tensor:
    """Decode latents [B, C, h, w] to images [B, 3, H, W] in -1..1, as `policy` says.

    If memory runs out, retries once, with a warning: one image at a time, or else in tiles.

    Raises:
        MemoryBudgetError: memory runs out again.
    """
    batch, _, height, width = latents.shape
    fallback = policy
    if batch > 1 and not policy.vae_slicing:
        fallback = replace(policy, vae_slicing=True)
    elif max(height, width) > FALLBACK_TILE and policy.decode_tile is None:
        fallback = replace(policy, decode_tile=FALLBACK_TILE)
    if fallback != policy:
        try:
            return _decode(decoder, latents, policy)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        # Outside the handler: its exception would keep the tensors of the first attempt alive.
        warnings.warn(
            f"out of memory while decoding; retrying with vae_slicing={fallback.vae_slicing}, "
            f"decode_tile={fallback.decode_tile}",
            stacklevel=2,
        )
    factor = decoder.spatial_factor
    with oom_hint(
        f"decoding {batch} image(s) of {width * factor}x{height * factor} pixels",
        partial(_decoder_bytes, decoder, latents, fallback),
        "use MemoryPolicy(offload_idle=True, vae_slicing=True, decode_tile=...) with a small tile such as "
        '32, a smaller height and width, or dtype="bfloat16"',
    ):
        return _decode(decoder, latents, fallback)


def _decode(decoder: ImageDecoder, latents: Tensor, policy: MemoryPolicy) -> Tensor:
    tile, rows = policy.decode_tile, latents.split(1 if policy.vae_slicing else len(latents))
    if tile is None or max(latents.shape[2:]) <= tile:
        images = [decoder(row) for row in rows]
    else:
        warnings.warn(
            f"decoding in tiles of {tile} latents is approximate: tone may drift between tiles", stacklevel=3
        )
        images = [
            in_tiles(
                lambda down, across, row=row: decoder(row[..., down, across]),
                (len(row), decoder.config.out_channels, *row.shape[2:]),
                tile=tile,
                device=row.device,
                factor=decoder.spatial_factor,
            )
            for row in rows
        ]
    return images[0] if len(images) == 1 else torch.cat(images)


def _decoder_bytes(decoder: ImageDecoder, latents: Tensor, policy: MemoryPolicy) -> int:
    """A lower bound: the weights, and the widest resnet block's input, skip and output at full resolution."""
    tile = policy.decode_tile or max(latents.shape[2:])
    pixels = math.prod(min(side, tile) * decoder.spatial_factor for side in latents.shape[2:])
    rows = 1 if policy.vae_slicing else len(latents)
    channels = sum(decoder.config.block_out_channels[:2])
    return weight_bytes(decoder) + rows * pixels * channels * latents.element_size()


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor has no NaN and no infinity."""
    return bool(torch.isfinite(tensor).all())


def in_float32(part: VAEPart) -> VAEPart:
    """A copy in float32; other threads may be using the original."""
    with torch.device("meta"):
        copy = type(part)(part.config)
    copy.load_state_dict({name: tensor.float() for name, tensor in part.state_dict().items()}, assign=True)
    copy.attention_backend = part.attention_backend
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
    """Images [B, 3, H, W] in 0..1 as an array [B, H, W, 3] of the same values."""
    return images.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def to_pil(images: Tensor) -> list[Image.Image]:
    """Images [B, 3, H, W] in 0..1 as 8-bit RGB, rounded to the nearest level."""
    return [Image.fromarray(levels) for levels in (to_numpy(images) * 255).round().astype("uint8")]
