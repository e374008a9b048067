"""What a run keeps of an image: put back, noised, wherever the network looks, and clean into the result."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from latentgen.diffusion.prediction import Denoised, Denoiser
from latentgen.diffusion.schedule import NoiseLevel


class Kept(NamedTuple):
    """The latents of an image, of which a run draws a part anew (as in arXiv:2201.09865, without its resampling).

    Attributes:
        latents: float32 [B, C, h, w], clean.
        noise: standard normal, of the same shape: what they are noised with at every level.
        drawn: bool [B, 1, h, w], true where they are not kept.
    """

    latents: Tensor
    noise: Tensor
    drawn: Tensor

    def put_back(self, x: Tensor, level: NoiseLevel) -> Tensor:
        """What is kept in its place, at the level at which x [B, C, h, w] stands."""
        return torch.where(self.drawn, x, level.alpha * self.latents + level.sigma * self.noise)

    def shown_to(self, denoiser: Denoiser, first: NoiseLevel) -> Denoiser:
        """A denoiser that finds it in its place at every level but the first, where a run stands as it began.

        That is enough: solvers work element by element, so what they make of the place of the kept has no influence
        on the rest but through the network. The results are those of replacing x after every step.
        """

        def denoise(x: Tensor, level: NoiseLevel) -> Tensor | Denoised:
            return denoiser(x if level == first else self.put_back(x, level), level)

        return denoise
