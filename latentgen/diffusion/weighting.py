"""How much the loss counts at each noise level, by its signal-to-noise ratio.

Weights are functions of the ratio alone, and multiply the loss of the named prediction type. Between the types, one
error is scaled: that of x0 is ``sigma / alpha``, and that of v_prediction ``1 / alpha`` times that of epsilon, so a
weight w of the squared error of epsilon is ``w * snr`` for sample and ``w * snr / (snr + 1)`` for v_prediction.
"""

from __future__ import annotations

from torch import Tensor

from latentgen.diffusion.prediction import PredictionType
from latentgen.diffusion.schedule import BatchNoiseLevel
from latentgen.errors import InputError

# Where kohya's trainer caps the ratio for the debiased weights.
_MAX_DEBIASED_SNR = 1000.0


def signal_to_noise(level: BatchNoiseLevel) -> Tensor:
    """``alpha**2 / sigma**2`` of each sample, [B] float32; 0 where there is no signal."""
    return (level.alpha / level.sigma).square().flatten()


def min_snr_weights(snr: Tensor, gamma: float, prediction_type: PredictionType) -> Tensor:
    """min-SNR-gamma (arXiv:2303.09556), shaped like snr.

    ``min(snr, gamma) / snr`` for epsilon (1 where snr is 0), ``min(snr, gamma)`` for sample and ``min(snr, gamma) /
    (snr + 1)`` for v_prediction.

    Raises:
        InputError: the prediction type is that of flow matching.
    """
    clamped = snr.clamp(max=gamma)
    if prediction_type == "epsilon":
        return (gamma / snr).clamp(max=1.0)
    return clamped if _is_sample(prediction_type) else clamped / (snr + 1)


def debiased_weights(snr: Tensor, prediction_type: PredictionType) -> Tensor:
    """Debiased estimation (arXiv:2310.08442), shaped like snr, which counts as 1000 above that.

    ``1 / sqrt(snr)`` for epsilon, the same of x0 (``sqrt(snr)``) for sample, and ``1 / (snr + 1)`` for v_prediction, as
    kohya's trainer has it.

    Raises:
        InputError: the prediction type is that of flow matching.
    """
    snr = snr.clamp(max=_MAX_DEBIASED_SNR)
    if prediction_type == "epsilon":
        return snr.rsqrt()
    return snr.sqrt() if _is_sample(prediction_type) else 1 / (snr + 1)


def p2_weights(snr: Tensor, gamma: float, k: float, prediction_type: PredictionType) -> Tensor:
    """Perception prioritised weights (arXiv:2204.00227), shaped like snr.

    ``(k + snr)**-gamma`` for epsilon, ``snr`` times that for sample and ``snr / (snr + 1)`` times for v_prediction.

    Raises:
        InputError: the prediction type is that of flow matching.
    """
    weights = (k + snr).pow(-gamma)
    if prediction_type == "epsilon":
        return weights
    return weights * (snr if _is_sample(prediction_type) else snr / (snr + 1))


def _is_sample(prediction_type: PredictionType) -> bool:
    """Whether it is sample, and not v_prediction."""
    if prediction_type == "flow_prediction":
        raise InputError(
            "flow_prediction: the weights of signal-to-noise ratios are those of diffusion models"
        )
    return prediction_type == "sample"
