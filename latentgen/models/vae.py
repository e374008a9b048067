"""The KL autoencoder (arXiv:2112.10752, section 3.1): encoder and decoder as separate stages.

Each loads its own part of a diffusers `vae/` folder strictly, so that text2img never holds an encoder. Images are
[B, 3, H, W] in -1..1; latents are [B, C, H/f, W/f], multiplied by the scaling factor, with f the `spatial_factor`.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentgen.models.attention import AttentionLayer, AttentionStage, attention
from latentgen.models.config import VAEConfig
from latentgen.models.layers import Downsample2D, ResnetBlock2D, Upsample2D

NORM_EPS = 1e-6
# The prefixes of the decoder's and the encoder's weights in a file that holds both.
DECODER_KEYS = ("decoder.", "post_quant_conv.")
ENCODER_KEYS = ("encoder.", "quant_conv.")


class Gaussian(NamedTuple):
    """A diagonal Gaussian over latents; both fields [B, C, h, w]."""

    mean: Tensor
    logvar: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """Latents drawn with the given standard normal `noise`, shaped like the mean."""
        return self.mean + torch.exp(0.5 * self.logvar) * noise

    def kl(self) -> Tensor:
        """KL divergence from the standard normal in nats, summed over each sample: [B] (arXiv:1312.6114, eq. 10)."""
        mean, logvar = self.mean.float(), self.logvar.float()
        return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(dim=1)


class VAEEncoder(AttentionStage):
    """Images to the distribution of their latents."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config, self.spatial_factor = config, config.spatial_factor
        self.encoder = _Encoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)

    def forward(self, images: Tensor) -> Gaussian:
        """Map images [B, 3, H, W] in -1..1 to the posterior over scaled latents [B, C, H/f, W/f]."""
        mean, logvar = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        scale = self.config.scaling_factor
        return Gaussian(mean * scale, logvar.clamp(-30.0, 20.0) + 2 * math.log(scale))


class VAEDecoder(AttentionStage):
    """Latents to images."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config, self.spatial_factor = config, config.spatial_factor
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)
        self.decoder = _Decoder(config)

    def forward(self, latents: Tensor) -> Tensor:
        """Map scaled latents [B, C, h, w] to images [B, 3, h*f, w*f], nominally in -1..1, not clamped."""
        return self.decoder(self.post_quant_conv(latents / self.config.scaling_factor))


class _Encoder(nn.Module):
    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        channels, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            _Block(*widths, config.layers_per_block, groups, downsample=level < len(channels) - 1)
            for level, widths in enumerate(pairwise((channels[0], *channels)))
        )
        self.mid_block = _MidBlock(channels[-1], config)
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], NORM_EPS)
        self.conv_out = nn.Conv2d(channels[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.conv_in(hidden)
        for block in self.down_blocks:
            hidden = block(hidden)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(hidden))))


class _Decoder(nn.Module):
    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        channels, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, channels[0], 3, padding=1)
        self.mid_block = _MidBlock(channels[0], config)
        self.up_blocks = nn.ModuleList(
            _Block(*widths, config.layers_per_block + 1, groups, upsample=level < len(channels) - 1)
            for level, widths in enumerate(pairwise((channels[0], *channels)))
        )
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], NORM_EPS)
        self.conv_out = nn.Conv2d(channels[-1], config.out_channels, 3, padding=1)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.mid_block(self.conv_in(hidden))
        for block in self.up_blocks:
            hidden = block(hidden)
        return self.conv_out(F.silu(self.conv_norm_out(hidden)))


def _resnets(in_channels: int, out_channels: int, count: int, groups: int) -> nn.ModuleList:
    widths = pairwise((in_channels, *(out_channels,) * count))
    return nn.ModuleList(ResnetBlock2D(*pair, groups=groups, eps=NORM_EPS) for pair in widths)


class _Block(nn.Module):
    """Resnet blocks, then a halving or a doubling of the resolution."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        count: int,
        groups: int,
        *,
        downsample: bool = False,
        upsample: bool = False,
    ) -> None:
        super().__init__()
        self.resnets = _resnets(in_channels, out_channels, count, groups)
        self.downsamplers = nn.ModuleList([Downsample2D(out_channels, padding=0)] if downsample else [])
        self.upsamplers = nn.ModuleList([Upsample2D(out_channels)] if upsample else [])

    def forward(self, hidden: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.downsamplers, *self.upsamplers):
            hidden = layer(hidden)
        return hidden


class _MidBlock(nn.Module):
    def __init__(self, channels: int, config: VAEConfig) -> None:
        super().__init__()
        self.resnets = _resnets(channels, channels, 2, config.norm_num_groups)
        self.attentions = nn.ModuleList(
            [_PixelAttention(channels, config.norm_num_groups)] if config.mid_block_add_attention else []
        )

    def forward(self, hidden: Tensor) -> Tensor:
        for layer in (self.resnets[0], *self.attentions, self.resnets[1]):
            hidden = layer(hidden)
        return hidden


class _PixelAttention(AttentionLayer):
    """Single-head self-attention over all pixels."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, NORM_EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, hidden: Tensor) -> Tensor:
        pixels = self.group_norm(hidden).flatten(2).transpose(1, 2)
        mixed = attention(self.to_q(pixels), self.to_k(pixels), self.to_v(pixels), 1, self.backend)
        return hidden + self.to_out[0](mixed).transpose(1, 2).unflatten(2, hidden.shape[2:])
