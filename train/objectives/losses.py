"""The parts of a diffusion loss: the schedule, the noise and noise level of each sample, and its weighted error."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from latentgen.diffusion.flow_matching import FlowSchedule
from latentgen.diffusion.prediction import PredictionType, target
from latentgen.diffusion.schedule import BatchNoiseLevel
from latentgen.diffusion.scheduler import Scheduler
from latentgen.errors import ConfigError
from latentgen.train.config import P2, Debiased, ErrorKind, LatentLoss, MinSNR, PyramidNoise
from latentgen.train.data import BatchIndices, sample_rng
from latentgen.train.objectives.base import Loss, Subset

# Where kohya's trainer caps the signal-to-noise ratio for debiased weights.
_MAX_DEBIASED_SNR = 1000.0


def training_scheduler(scheduler: Scheduler, loss: LatentLoss) -> Scheduler:
    """The scheduler whose noise levels a model is trained on, and that it is saved with.

    With zero terminal SNR the schedule is rescaled, if it is not yet, and sampling starts at its last timestep
    (arXiv:2305.08891, algorithm 1 and section 3.3).

    Raises:
        ConfigError: the loss does not support this schedule, solver or prediction type.
    """
    if isinstance(scheduler.schedule, FlowSchedule):
        if loss.weighting is not None or loss.zero_terminal_snr:
            raise ConfigError("task.loss: weighting and zero_terminal_snr are not for flow matching")
        return scheduler
    if loss.zero_terminal_snr:
        if not scheduler.stores_zero_snr:
            found = scheduler.to_config()["_class_name"]
            raise ConfigError(f"task.loss.zero_terminal_snr: use DDIMScheduler or DDPMScheduler, not {found}")
        schedule = replace(scheduler.schedule, rescale_betas_zero_snr=True)
        scheduler = replace(scheduler, schedule=schedule, spacing="trailing")
    if scheduler.prediction_type == "epsilon" and scheduler.schedule.batch(torch.tensor([-1])).alpha == 0:
        raise ConfigError("task.scheduler.prediction_type must be v_prediction for a zero terminal SNR")
    return scheduler


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
    """The middles of `parts` equal parts of `count` timesteps, without duplicates."""
    return sorted({(2 * part + 1) * count // (2 * parts) for part in range(parts)})


def sample_errors(
    output: Tensor,
    latents: Tensor,
    noise: Tensor,
    level: BatchNoiseLevel,
    scheduler: Scheduler,
    loss: LatentLoss,
    mask: Tensor | None = None,
) -> Tensor:
    """The weighted error of each sample's prediction, [B] float32.

    Args:
        output: of the UNet, [B, C, h, w] in any dtype.
        latents: without noise, [B, C, h, w].
        noise: the noise to predict, [B, C, h, w].
        level: of each sample.
        scheduler: its prediction type says what the output means.
        loss: what the recipe says.
        mask: the weight of each place, [B, 1, h, w] in 0..1. The error is divided by the mean of the mask, as in
            cloneofsimo's trainer, so that small subjects have the same weight as large ones; kohya's does not do that.
            With a mask that is 0 everywhere the error is 0.
    """
    # Targets: the noise, v = alpha * noise - sigma * x0 (arXiv:2202.00512, appendix D), or x0.
    expected = target(latents, noise, level, scheduler.prediction_type)
    errors = elementwise_error(output.float(), expected, loss.kind, loss.huber_c)
    if mask is None:
        errors = errors.mean(dim=(1, 2, 3))
    else:
        counted = mask.mean(dim=(1, 2, 3))
        errors = (errors * mask).mean(dim=(1, 2, 3)) / torch.where(counted > 0, counted, 1.0)
    if loss.weighting is None:
        return errors
    return errors * level_weights(signal_to_noise(level), scheduler.prediction_type, loss.weighting)


def signal_to_noise(level: BatchNoiseLevel) -> Tensor:
    """``alpha**2 / sigma**2`` of each sample, [B] float32; 0 where there is no signal."""
    return (level.alpha / level.sigma).square().flatten()


def level_weights(snr: Tensor, prediction_type: PredictionType, weighting: MinSNR | Debiased | P2) -> Tensor:
    """How much the squared error of each prediction counts, by its signal-to-noise ratio; shaped like `snr`.

    The error of x0 is ``sigma / alpha`` times that of epsilon, and that of v_prediction ``1 / alpha`` times, so the
    weight w for epsilon is ``w * snr`` for sample and ``w * snr / (snr + 1)`` for v_prediction. Those are written so
    that they are finite where snr is 0.
    """
    if isinstance(weighting, MinSNR):  # arXiv:2303.09556
        clamped = snr.clamp(max=weighting.gamma)
        by_type = {
            "epsilon": (weighting.gamma / snr).clamp(max=1.0),
            "sample": clamped,
            "v_prediction": clamped / (snr + 1),
        }
    elif isinstance(weighting, P2):  # arXiv:2204.00227
        weights = (weighting.k + snr).pow(-weighting.gamma)
        by_type = {"epsilon": weights, "sample": weights * snr, "v_prediction": weights * (snr / (snr + 1))}
    else:  # arXiv:2310.08442, with the cap and the weight of v_prediction of kohya's trainer
        snr = snr.clamp(max=_MAX_DEBIASED_SNR)
        by_type = {"epsilon": snr.rsqrt(), "sample": snr.sqrt(), "v_prediction": 1 / (snr + 1)}
    return by_type[prediction_type]


def elementwise_error(output: Tensor, expected: Tensor, kind: ErrorKind, c: float) -> Tensor:
    """The error of each element, shaped like both.

    `l2` is the squared error; `huber` is ``2 c (sqrt(d**2 + c**2) - c)`` of the difference d (pseudo-Huber,
    arXiv:2403.16728): the squared error where d is far below c; `smooth_l1` is that divided by c: twice the absolute
    error where d is far above.
    """
    squared = F.mse_loss(output, expected, reduction="none")
    if kind == "l2":
        return squared
    # 2 (sqrt(d**2 + c**2) - c), without the difference of two numbers that are nearly the same.
    smooth = 2 * squared / (torch.sqrt(squared + c**2) + c)
    return c * smooth if kind == "huber" else smooth


def mean_loss(errors: Tensor, level: BatchNoiseLevel, scheduler: Scheduler) -> Loss:
    """The mean of the samples' errors [B]; its subset is the samples at the noisier half of the timesteps."""
    noisy = 2 * level.timestep >= scheduler.schedule.num_train_timesteps
    subset = Subset((errors * noisy).sum(), noisy.sum(dtype=errors.dtype))
    return Loss(errors.mean(), {}, {"noisy half": subset})
