from __future__ import annotations

import math

import pytest
import torch

from latentgen.diffusion.guidance import classifier_free, is_guided
from latentgen.diffusion.schedule import NoiseLevel
from latentgen.errors import InputError

LEVEL = NoiseLevel.from_sigma_ve(2.0, 500.0)
X, UNCONDITIONAL, CONDITIONAL = torch.randn(3, 2, 4, 3, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("guidance_scale", [1.5, 7.5, 30.0])
def test_raw_outputs_are_combined_before_x0(guidance_scale: float) -> None:
    denoise = classifier_free(lambda x, level: (UNCONDITIONAL, CONDITIONAL), "epsilon", guidance_scale)
    epsilon = UNCONDITIONAL + guidance_scale * (CONDITIONAL - UNCONDITIONAL)
    expected = (X - LEVEL.sigma * epsilon) / LEVEL.alpha
    torch.testing.assert_close(denoise(X, LEVEL), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("guidance_scale", [-2.0, 0.0, 1.0])
def test_at_scale_1_and_below_only_the_conditional_output_counts(guidance_scale: float) -> None:
    assert not is_guided(guidance_scale)
    for unconditional in (None, UNCONDITIONAL):
        denoise = classifier_free(
            lambda x, level, u=unconditional: (u, CONDITIONAL), "sample", guidance_scale
        )
        assert torch.equal(denoise(X, LEVEL), CONDITIONAL)


@pytest.mark.parametrize("guidance_scale", [math.nan, math.inf])
def test_a_scale_that_is_no_number_is_refused(guidance_scale: float) -> None:
    with pytest.raises(InputError, match="guidance_scale"):
        classifier_free(lambda x, level: (UNCONDITIONAL, CONDITIONAL), "epsilon", guidance_scale)


def test_guidance_without_an_unconditional_output_is_refused() -> None:
    denoise = classifier_free(lambda x, level: (None, CONDITIONAL), "epsilon", 7.5)
    with pytest.raises(InputError, match="unconditional"):
        denoise(X, LEVEL)
