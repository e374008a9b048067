"""The noise that a model learns to predict, and the noise levels: drawn for each sample by itself."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from latentgen.train.config import LatentLoss, PyramidNoise
from latentgen.train.data import BatchIndices, sample_rng


def training_noise(plan: BatchIndices, shape: Sequence[int], loss: LatentLoss) -> Tensor:
    """The noise of each sample, [B, *shape] float32 for shape (C, h, w): standard normal, plus what `loss` adds."""
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
    """The noise [B, C, h, w] of the UNet's input where `noise` is to be predicted (arXiv:2301.11706, algorithm 1)."""
    return noise + strength * plan.noise(noise.shape[1:], "input perturbation")


def pyramid_noise(noise: Tensor, pyramid: PyramidNoise, rng: random.Random) -> Tensor:
    """Noise [C, h, w] of one sample with coarser noise added, scaled back to a standard deviation of 1.

    The formula is that of kohya's trainer, after J. Whitaker's multi-resolution noise: octave i, from 0, has
    the sides of the noise divided by ``r**i``, with r uniform in 2..4 for each, and the weight ``discount**i``; the
    last has a side of one. The trainer scales the whole batch, this function each sample, so that none depends on
    another.
    """
    generator = torch.Generator().manual_seed(rng.getrandbits(63))
    channels, height, width = noise.shape
    for octave in range(pyramid.iterations):
        shrunk = rng.uniform(2.0, 4.0) ** octave
        size = max(1, int(height / shrunk)), max(1, int(width / shrunk))
        coarse = torch.randn(1, channels, *size, generator=generator)
        coarse = F.interpolate(coarse, size=(height, width), mode="bilinear")[0]
        noise = noise + pyramid.discount**octave * coarse
        if 1 in size:
            break
    return noise / noise.std()


def spread_timesteps(plan: BatchIndices, count: int, shift: float) -> Tensor:
    """One of `count` timesteps for each sample, spread evenly over the global batch from a random start.

    Each is uniform by itself; together they cover the schedule, which lowers the variance of the loss
    (arXiv:2107.00630, appendix I.1). `shift` then moves them towards noise (arXiv:2403.03206, eq. 23).
    """
    start = sample_rng(plan.seed, "timestep", plan.step).random()
    places = [(start + sample / plan.batch_size) % 1.0 for sample in plan.samples]
    places = [shift * place / (1 + (shift - 1) * place) for place in places]
    return torch.tensor([int(place * count) for place in places])


def middles(count: int, parts: int) -> list[int]:
    """The middles of `parts` equal parts of `count` timesteps; none comes twice."""
    return sorted({(2 * part + 1) * count // (2 * parts) for part in range(parts)})
