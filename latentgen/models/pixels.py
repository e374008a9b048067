"""The identity first stage: diffusion on pixels, whose "latents" are the images themselves, [B, 3, H, W] in -1..1.

Encoder and decoder have the interface of the VAE's, and no weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from latentgen.models.attention import AttentionStage
from latentgen.models.vae import Gaussian, VAEDecoder, VAEEncoder

# A log variance whose exponential is 0 in every dtype, and which is finite in float16.
_ZERO_VARIANCE = -1e4


@dataclass(frozen=True)
class PixelConfig:
    """The fields of a VAEConfig that other code reads, for RGB pixels."""

    latent_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (3,)
    spatial_factor: int = 1
    scaling_factor: float = 1.0


class PixelEncoder(AttentionStage):
    """The identity, in place of a VAE's encoder."""

    config = PixelConfig()
    spatial_factor = 1

    def forward(self, images: Tensor) -> Gaussian:
        """Images [B, 3, H, W] in -1..1 as a distribution of variance 0."""
        return Gaussian(images, torch.full_like(images, _ZERO_VARIANCE))


class PixelDecoder(AttentionStage):
    """The identity, in place of a VAE's decoder."""

    config = PixelConfig()
    spatial_factor = 1

    def forward(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W], nominally in -1..1, unchanged."""
        return latents


ImageEncoder: TypeAlias = VAEEncoder | PixelEncoder
ImageDecoder: TypeAlias = VAEDecoder | PixelDecoder
