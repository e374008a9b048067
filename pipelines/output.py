"""What the pipelines share after denoising: decoding, and results."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from latentgen.errors import NumericalError
from latentgen.image import to_numpy, to_pil, to_unit
from latentgen.memory import MemoryPolicy, decode, resident
from latentgen.models.vae import VAEDecoder
from latentgen.pipelines.arguments import OutputType

Images = list[Image.Image] | np.ndarray | Tensor


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
