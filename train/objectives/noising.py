"""The noise that a model learns to predict, drawn for each sample by itself."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from latentgen.train.config import LatentLoss, PyramidNoise
from latentgen.train.data import BatchIndices


def training_noise(plan: BatchIndices, shape: Sequence[int], loss: LatentLoss) -> Tensor:
    """The noise of each sample, [B, *shape] float32 for shape (C, h, w): standard normal but for what `loss` adds."""
    noise = plan.noise(shape, "noise")
    if loss.offset_noise:
        noise = noise + loss.offset_noise * plan.noise((shape[0], 1, 1), "offset noise")
    if loss.pyramid_noise is not None:
        rngs = plan.rngs("pyramid noise")
        noise = torch.stack(
            [pyramid_noise(row, loss.pyramid_noise, rng) for row, rng in zip(noise, rngs, strict=True)]
        )
    return noise


def perturbed_noise(plan: BatchIndices, noise: Tensor, strength: float) -> Tensor:
    """The noise [B, C, h, w] that the UNet sees where it is to predict `noise` (arXiv:2301.11706, algorithm 1)."""
    return noise + strength * plan.noise(noise.shape[1:], "input perturbation")


def pyramid_noise(noise: Tensor, pyramid: PyramidNoise, rng: random.Random) -> Tensor:
    """Noise [C, h, w] of one sample with coarser noise added, scaled back to a standard deviation of 1.

    The formula is that of kohya's trainer, after J. Whitaker's multi-resolution noise: level i, from 0, is as large as
    the noise over ``r**i``, with r uniform in 2..4 for each, and counts ``discount**i``; the last is that whose side is
    one. There the scale is that of the whole batch, here of each sample, so that none depends on another.
    """
    generator = torch.Generator().manual_seed(rng.getrandbits(63))
    channels, height, width = noise.shape
    for level in range(pyramid.iterations):
        shrunk = rng.uniform(2.0, 4.0) ** level
        size = max(1, int(height / shrunk)), max(1, int(width / shrunk))
        coarse = torch.randn(1, channels, *size, generator=generator)
        coarse = F.interpolate(coarse, size=(height, width), mode="bilinear")[0]
        noise = noise + pyramid.discount**level * coarse
        if 1 in size:
            break
    return noise / noise.std()
