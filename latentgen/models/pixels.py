"""The identity first stage: diffusion on pixels, whose "latents" are the images themselves, [B, 3, H, W] in -1..1.

Both halves stand where those of an autoencoder stand, so that everything around them stays the same. They hold no
weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from latentgen.models.attention import AttentionStage
from latentgen.models.vae import Gaussian, VAEDecoder, VAEEncoder

# The log variance of what is certain: its exponential is 0 in every dtype, and it is itself finite in float16.
_CERTAIN = -1e4


@dataclass(frozen=True)
class PixelConfig:
    """What others ask an autoencoder's configuration, answered for RGB pixels."""

    latent_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (3,)
    spatial_factor: int = 1
    scaling_factor: float = 1.0


RGB = PixelConfig()


class PixelEncoder(AttentionStage):
    """Images to themselves."""

    def __init__(self, config: PixelConfig = RGB) -> None:
        super().__init__()
        self.config = config

    def forward(self, images: Tensor) -> Gaussian:
        """Images [B, 3, H, W] in -1..1 as a distribution without spread: every sample of it is the images."""
        return Gaussian(images, torch.full_like(images, _CERTAIN))


class PixelDecoder(AttentionStage):
    """Images to themselves."""

    def __init__(self, config: PixelConfig = RGB) -> None:
        super().__init__()
        self.config = config

    def forward(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W], nominally in -1..1, as they come."""
        return latents


ImageEncoder: TypeAlias = VAEEncoder | PixelEncoder
ImageDecoder: TypeAlias = VAEDecoder | PixelDecoder
