"""The loss of diffusion training: the error of each sample, and the schedule that it is measured on."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from latentgen.diffusion.flow_matching import FlowSchedule
from latentgen.diffusion.prediction import PredictionType, target
from latentgen.diffusion.schedule import BatchNoiseLevel
from latentgen.diffusion.scheduler import Scheduler
from latentgen.diffusion.weighting import (
    debiased_weights,
    min_snr_weights,
    p2_weights,
    signal_to_noise,
)
from latentgen.errors import ConfigError
from latentgen.train.config import P2, ErrorKind, LatentLoss, MinSNR
from latentgen.train.objectives.base import Loss, Subset


def training_scheduler(scheduler: Scheduler, loss: LatentLoss) -> Scheduler:
    """The scheduler whose noise levels a model is trained on, and that it is saved with.

    With zero terminal SNR the schedule is rescaled, if it is not yet, and sampling starts at its last timestep
    (arXiv:2305.08891, algorithm 1 and section 3.3).

    Raises:
        ConfigError: the loss does not support this schedule, solver or prediction type.
    """
    if isinstance(scheduler.schedule, FlowSchedule):
        if loss.weighting is not None or loss.zero_terminal_snr:
            raise ConfigError(
                "task.loss: weighting and zero_terminal_snr are for diffusion models, and task.scheduler is a "
                "flow-matching scheduler; leave them out"
            )
        return scheduler
    if loss.zero_terminal_snr:
        if not scheduler.stores_zero_snr:
            raise ConfigError(
                f"task.loss.zero_terminal_snr: the configuration of task.scheduler, "
                f"{scheduler.to_config()['_class_name']}, has no rescale_betas_zero_snr; use DDIMScheduler or "
                "DDPMScheduler"
            )
        schedule = replace(scheduler.schedule, rescale_betas_zero_snr=True)
        scheduler = replace(scheduler, schedule=schedule, spacing="trailing")
    if scheduler.prediction_type == "epsilon" and scheduler.schedule.batch(torch.tensor([-1])).alpha == 0:
        raise ConfigError(
            "task.scheduler.prediction_type is epsilon, from which x0 cannot be computed at the last timestep of a "
            "schedule with zero terminal SNR; use v_prediction, or leave out task.loss.zero_terminal_snr and "
            "task.scheduler.rescale_betas_zero_snr"
        )
    return scheduler


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
    return errors * level_weights(level, scheduler.prediction_type, loss)


def level_weights(level: BatchNoiseLevel, prediction_type: PredictionType, loss: LatentLoss) -> Tensor:
    """The weight of each sample by its noise level, [B] float32."""
    snr = signal_to_noise(level)
    weighting = loss.weighting
    if weighting is None:
        return torch.ones_like(snr)
    if isinstance(weighting, MinSNR):
        return min_snr_weights(snr, weighting.gamma, prediction_type)
    if isinstance(weighting, P2):
        return p2_weights(snr, weighting.gamma, weighting.k, prediction_type)
    return debiased_weights(snr, prediction_type)


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
