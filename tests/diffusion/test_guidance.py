from __future__ import annotations

import math

import pytest
import torch

from latentgen.diffusion.guidance import ClassifierFree, TextAndImage, guided, is_guided
from latentgen.diffusion.schedule import NoiseLevel
from latentgen.errors import InputError

LEVEL = NoiseLevel.from_sigma_ve(2.0, 500.0)
X, UNCONDITIONAL, IMAGE, CONDITIONAL = torch.randn(4, 2, 4, 3, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("guidance_scale", [1.5, 7.5, 30.0])
def test_raw_outputs_are_combined_before_x0(guidance_scale: float) -> None:
    denoise = guided(lambda x, level: (UNCONDITIONAL, CONDITIONAL), "epsilon", ClassifierFree(guidance_scale))
    epsilon = UNCONDITIONAL + guidance_scale * (CONDITIONAL - UNCONDITIONAL)
    expected = (X - LEVEL.sigma * epsilon) / LEVEL.alpha
    torch.testing.assert_close(denoise(X, LEVEL), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("guidance_scale", [-2.0, 0.0, 1.0])
def test_at_scale_1_and_below_there_is_one_output(guidance_scale: float) -> None:
    assert not is_guided(guidance_scale)
    guidance = ClassifierFree(guidance_scale)
    assert guidance.rows == 1
    assert torch.equal(guided(lambda x, level: (CONDITIONAL,), "sample", guidance)(X, LEVEL), CONDITIONAL)


@pytest.mark.parametrize("guidance_scale", [math.nan, math.inf])
def test_a_scale_that_is_no_number_is_refused(guidance_scale: float) -> None:
    with pytest.raises(InputError, match="guidance_scale"):
        ClassifierFree(guidance_scale)


def test_image_and_text_guide_apart() -> None:
    outputs = (UNCONDITIONAL, IMAGE, CONDITIONAL)
    assert TextAndImage(7.5, 1.5).rows == len(outputs)
    expected = UNCONDITIONAL + 7.5 * (CONDITIONAL - IMAGE) + 1.5 * (IMAGE - UNCONDITIONAL)
    torch.testing.assert_close(TextAndImage(7.5, 1.5)(outputs), expected)
    # With scales of 1 nothing but the full condition is left; with equal scales the image alone does not matter.
    torch.testing.assert_close(TextAndImage(1.0, 1.0)(outputs), CONDITIONAL)
    torch.testing.assert_close(
        TextAndImage(3.0, 3.0)(outputs), ClassifierFree(3.0)((UNCONDITIONAL, CONDITIONAL))
    )
