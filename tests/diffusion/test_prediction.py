from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch

from latentgen.diffusion.flow_matching import FlowSchedule
from latentgen.diffusion.prediction import Clipping, PredictionType, add_noise, from_x0, target, to_x0
from latentgen.diffusion.schedule import NoiseLevel, NoiseSchedule
from latentgen.errors import ConfigError

SCHEDULE, FLOW = NoiseSchedule(), FlowSchedule()
LEVELS = {
    "first": (SCHEDULE.level(0), FLOW.level(0.1)),
    "middle": (SCHEDULE.level(500), FLOW.level(500)),
    "batch": (SCHEDULE.batch(torch.tensor([3, 400, 999])), FLOW.batch(torch.tensor([30.0, 400.5, 1000.0]))),
}


def draw(seed: int) -> torch.Tensor:
    return torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("prediction_type", get_args(PredictionType))
@pytest.mark.parametrize("where", LEVELS)
def test_outputs_and_targets_are_the_inverse_of_x0(where: str, prediction_type: PredictionType) -> None:
    level = LEVELS[where][prediction_type == "flow_prediction"]
    output, x = draw(0), draw(1)
    x0 = to_x0(output, x, level, prediction_type)
    torch.testing.assert_close(from_x0(x0, x, level, prediction_type), output, rtol=1e-5, atol=1e-5)
    x0, noise = draw(0), draw(1)
    output = target(x0, noise, level, prediction_type)
    found = to_x0(output, add_noise(x0, noise, level), level, prediction_type)
    torch.testing.assert_close(found, x0, rtol=1e-5, atol=1e-5)


def test_v_prediction_is_the_angular_velocity() -> None:
    x0, noise = draw(0), draw(1)

    def x_at(angle: float) -> torch.Tensor:
        return add_noise(x0, noise, NoiseLevel(math.cos(angle), math.sin(angle), 0.0))

    angle, half = 0.7, 1e-5
    velocity = (x_at(angle + half) - x_at(angle - half)) / (2 * half)
    level = NoiseLevel(math.cos(angle), math.sin(angle), 0.0)
    torch.testing.assert_close(target(x0, noise, level, "v_prediction"), velocity, rtol=1e-8, atol=1e-8)


def test_flow_prediction_is_the_velocity_from_data_to_noise() -> None:
    x0, noise = draw(0), draw(1)
    velocity = (add_noise(x0, noise, FLOW.level(600)) - add_noise(x0, noise, FLOW.level(100))) / 0.5
    expected = target(x0, noise, FLOW.level(350), "flow_prediction")
    torch.testing.assert_close(expected, velocity, rtol=1e-8, atol=1e-8)


def test_x0_is_finite_where_there_is_no_signal() -> None:
    output, x = draw(0), draw(1)
    torch.testing.assert_close(to_x0(output, x, FLOW.level(1000), "flow_prediction"), x - output)
    torch.testing.assert_close(to_x0(output, x, NoiseLevel(0.0, 1.0, 999.0), "v_prediction"), -output)


@pytest.mark.parametrize("prediction_type", get_args(PredictionType))
def test_a_half_precision_output_is_combined_in_the_precision_of_x(prediction_type: PredictionType) -> None:
    output, x, level = draw(0).half(), draw(1).float(), SCHEDULE.level(900)
    x0 = to_x0(output, x, level, prediction_type)
    assert x0.dtype == torch.float32
    torch.testing.assert_close(x0, to_x0(output.float(), x, level, prediction_type), rtol=0, atol=0)


def test_clip_sample() -> None:
    x0 = 3 * draw(0)
    assert Clipping()(x0) is x0
    assert Clipping(clip_sample=True, clip_sample_range=0.5)(x0).abs().max() == 0.5


def test_thresholding_scales_each_sample_by_its_own_quantile() -> None:
    x0 = torch.stack([torch.linspace(-0.5, 0.5, 101), torch.linspace(-4, 4, 101)]).view(2, 1, 1, 101).double()
    clipping = Clipping(thresholding=True, dynamic_thresholding_ratio=0.5, sample_max_value=10.0)
    small, large = clipping(x0)
    torch.testing.assert_close(small, x0[0])
    torch.testing.assert_close(large, (x0[1] / 2).clamp(-1, 1))


@pytest.mark.parametrize(
    "options",
    [
        {"clip_sample_range": 0.0},
        {"clip_sample_range": math.nan},
        {"dynamic_thresholding_ratio": 1.1},
        {"sample_max_value": 0.5},
    ],
)
def test_bad_bounds_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        Clipping(**options)
