"""Weights by signal-to-noise ratio against diffusers' training scripts, and against what they do to the gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from latentgen.diffusion.prediction import PredictionType, add_noise, from_x0, target
from latentgen.diffusion.schedule import BatchNoiseLevel, NoiseSchedule
from latentgen.diffusion.weighting import (
    debiased_weights,
    min_snr_weights,
    p2_weights,
    signal_to_noise,
)
from latentgen.errors import InputError

TIMESTEPS = torch.tensor([0, 1, 20, 200, 500, 700, 998, 999])
PREDICTION_TYPES: tuple[PredictionType, ...] = ("epsilon", "sample", "v_prediction")


def stable_diffusion(*, zero_snr: bool = False) -> NoiseSchedule:
    return NoiseSchedule(1000, 0.00085, 0.012, "scaled_linear", rescale_betas_zero_snr=zero_snr)


def diffusers_snr(*, zero_snr: bool = False) -> Tensor:
    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_snr

    scheduler = DDPMScheduler(
        1000, 0.00085, 0.012, "scaled_linear", rescale_betas_zero_snr=zero_snr, prediction_type="v_prediction"
    )
    return compute_snr(scheduler, TIMESTEPS)


@pytest.mark.parametrize("zero_snr", [False, True])
def test_the_ratio_is_that_of_diffusers(zero_snr: bool):
    ours = signal_to_noise(stable_diffusion(zero_snr=zero_snr).batch(TIMESTEPS))
    torch.testing.assert_close(ours, diffusers_snr(zero_snr=zero_snr), rtol=1e-4, atol=1e-7)
    assert (ours[-1] == 0) == zero_snr


@pytest.mark.parametrize("gamma", [1.0, 5.0, 20.0])
def test_min_snr_is_that_of_diffusers_scripts(gamma: float):
    snr = diffusers_snr()
    # As train_text_to_image.py has it.
    clamped = torch.stack([snr, gamma * torch.ones_like(TIMESTEPS)], dim=1).min(dim=1)[0]
    torch.testing.assert_close(min_snr_weights(snr, gamma, "epsilon"), clamped / snr)
    torch.testing.assert_close(min_snr_weights(snr, gamma, "v_prediction"), clamped / (snr + 1))
    torch.testing.assert_close(min_snr_weights(snr, gamma, "sample"), clamped)


def test_debiased_weights_are_those_of_kohyas_trainer():
    snr = diffusers_snr()
    capped = torch.minimum(snr, torch.full_like(snr, 1000))
    assert snr[0] > 1000
    torch.testing.assert_close(debiased_weights(snr, "epsilon"), 1 / torch.sqrt(capped))
    torch.testing.assert_close(debiased_weights(snr, "v_prediction"), 1 / (capped + 1))


def test_p2_prefers_noise_to_detail():
    snr = diffusers_snr()
    torch.testing.assert_close(p2_weights(snr, 1.0, 1.0, "epsilon"), 1 - snr / (1 + snr))
    torch.testing.assert_close(p2_weights(snr, 0.5, 2.0, "epsilon"), 1 / torch.sqrt(2 + snr))
    assert (p2_weights(snr, 1.0, 1.0, "epsilon").diff() > 0).all()


def squared_errors(level: BatchNoiseLevel, prediction_type: PredictionType) -> Tensor:
    """Of one and the same error of x0, told as each prediction type tells it, in float64."""
    generator = torch.Generator().manual_seed(0)
    x0, noise, error = torch.randn(3, len(TIMESTEPS), 4, 8, 8, generator=generator, dtype=torch.float64)
    output = from_x0(x0 + error, add_noise(x0, noise, level), level, prediction_type)
    return (output - target(x0, noise, level, prediction_type)).square().mean(dim=(1, 2, 3))


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_an_error_counts_the_same_however_it_is_told(prediction_type: PredictionType):
    schedule = stable_diffusion()
    alpha = torch.tensor(schedule.alphas_cumprod)[TIMESTEPS].sqrt().view(-1, 1, 1, 1)
    level = BatchNoiseLevel(alpha, (1 - alpha**2).sqrt(), TIMESTEPS)
    snr = signal_to_noise(level)
    for weights in (
        lambda kind: min_snr_weights(snr, 5.0, kind),
        lambda kind: p2_weights(snr, 1.0, 1.0, kind),
    ):
        ours = weights(prediction_type) * squared_errors(level, prediction_type)
        torch.testing.assert_close(ours, weights("epsilon") * squared_errors(level, "epsilon"))
    if prediction_type == "sample":
        below = snr < 1000
        ours = debiased_weights(snr, "sample") * squared_errors(level, "sample")
        theirs = debiased_weights(snr, "epsilon") * squared_errors(level, "epsilon")
        torch.testing.assert_close(ours[below], theirs[below])


def test_weights_are_finite_where_there_is_no_signal():
    nothing = torch.zeros(1)
    for kind in PREDICTION_TYPES:
        assert min_snr_weights(nothing, 5.0, kind).item() == (1.0 if kind == "epsilon" else 0.0)
        assert p2_weights(nothing, 1.0, 2.0, kind).item() == (0.5 if kind == "epsilon" else 0.0)
    assert debiased_weights(nothing, "v_prediction").item() == 1.0
    assert debiased_weights(nothing, "sample").item() == 0.0


def test_flow_matching_has_no_such_weights():
    for weigh in (
        lambda snr: min_snr_weights(snr, 5.0, "flow_prediction"),
        lambda snr: debiased_weights(snr, "flow_prediction"),
        lambda snr: p2_weights(snr, 1.0, 1.0, "flow_prediction"),
    ):
        with pytest.raises(InputError, match="flow_prediction"):
            weigh(torch.ones(1))
