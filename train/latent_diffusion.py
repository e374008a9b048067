"""What the objectives of diffusion in the latents of a finished autoencoder share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from latentgen.diffusion.prediction import target
from latentgen.diffusion.schedule import BatchNoiseLevel
from latentgen.diffusion.scheduler import Scheduler
from latentgen.models.pixels import ImageEncoder
from latentgen.train.data import BatchPlan, CaptionedImages, Captions, View, sample_rng, to_tensor
from latentgen.train.objective import Loss

ENCODING_BATCH = 32
# Pixels of latents up to which all attention scores of a batch are cheap to hold.
SMALL_LATENTS = 32 * 32


class EncodedViews(NamedTuple):
    """Views of images, encoded once: mean and standard deviation of their latents, and what each may be called.

    The tensors are float16 [views, C, h, w], on the CPU.
    """

    means: Tensor
    stds: Tensor
    captions: Sequence[Captions]

    def latents(self, plan: BatchPlan) -> Tensor:
        """A draw from the posterior of each sample, float32 [B, C, h, w]."""
        items = torch.tensor(plan.items)
        mean, std = self.means[items].float(), self.stds[items].float()
        return mean + std * plan.noise(mean.shape[1:], "posterior")

    def draw_captions(self, plan: BatchPlan, dropout: float) -> list[str]:
        """A caption for each sample, left empty at the rate of `dropout` (arXiv:2207.12598)."""
        captions = []
        for item, rng in zip(plan.items, plan.rngs("caption"), strict=True):
            dropped = rng.random() < dropout
            captions.append("" if dropped else self.captions[item].draw(rng))
        return captions


def fixed_views(data: CaptionedImages, views: int, seed: int) -> Iterator[View]:
    """`views` random views of every item, the same in every process of a run: those of one item follow each other."""
    for item in range(len(data)):
        for number in range(views):
            yield data.view(item, sample_rng(seed, "cached view", item, number))


@torch.no_grad()
def encode_views(
    encoder: ImageEncoder, device: torch.device, views: Iterator[View], count: int
) -> EncodedViews:
    """Encode `count` views, a few at a time."""
    means, stds, captions = [], [], []
    for _ in tqdm(range(0, count, ENCODING_BATCH), desc="encoding the images", mininterval=1.0):
        batch = list(islice(views, ENCODING_BATCH))
        posterior = encoder(to_tensor([view.image for view in batch]).to(device))
        means.append(posterior.mean.half().cpu())
        stds.append((0.5 * posterior.logvar).exp().half().cpu())
        captions += [view.captions for view in batch]
    # The convolutions would hand on the encoder's channels_last.
    return EncodedViews(torch.cat(means).contiguous(), torch.cat(stds).contiguous(), captions)


def spread_timesteps(plan: BatchPlan, count: int, shift: float) -> Tensor:
    """One of `count` timesteps for each sample, spread evenly over the global batch from a random start.

    Each is uniform by itself; together they cover the schedule, which lowers the variance of the loss
    (arXiv:2107.00630, appendix I.1). `shift` then moves them towards noise (arXiv:2403.03206, eq. 23).
    """
    start = sample_rng(plan.seed, "timestep", plan.step).random()
    places = [(start + sample / plan.batch_size) % 1.0 for sample in plan.samples]
    places = [shift * place / (1 + (shift - 1) * place) for place in places]
    return torch.tensor([int(place * count) for place in places])


def prediction_loss(
    output: Tensor, latents: Tensor, noise: Tensor, level: BatchNoiseLevel, scheduler: Scheduler
) -> Loss:
    """The mean squared error of the prediction; its part is the same at the noisier half of the timesteps."""
    wanted = target(latents, noise, level, scheduler.prediction_type)
    errors = F.mse_loss(output.float(), wanted, reduction="none").mean(dim=(1, 2, 3))
    noisy = 2 * level.timestep >= scheduler.schedule.num_train_timesteps
    return Loss(errors.mean(), {"noisy half": (errors * noisy).sum() / noisy.sum().clamp(min=1)})


def attention_kernels(latents: Tensor) -> AbstractContextManager[Any]:
    """On a CPU the backward pass of fused attention is slow: small latents do better with plain matrix products.

    On the emoji recipe the whole backward pass takes 0.68x the time.
    """
    if latents.device.type == "cpu" and latents.shape[-2] * latents.shape[-1] <= SMALL_LATENTS:
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()
