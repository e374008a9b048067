from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from latentgen.pipelines.inpaint_crop import Box, Canvas, blurred, mask_bbox


def masked(height: int, width: int, box: Box) -> torch.Tensor:
    mask = torch.zeros(1, 1, height, width)
    box.of(mask).fill_(1)
    return mask


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("size", [(64, 64), (64, 96)])
def test_the_box_is_that_of_diffusers(seed: int, size: tuple[int, int]) -> None:
    rng = np.random.default_rng(seed)
    height, width = rng.integers(40, 200, 2)
    top, left = rng.integers(0, height - 1), rng.integers(0, width - 1)
    marked = Box(top, left, rng.integers(1, height - top + 1), rng.integers(1, width - left + 1))
    padding = int(rng.integers(0, 30))
    mask = masked(height, width, marked)[0, 0]
    ours = mask_bbox(mask, padding, size[1] / size[0])
    picture = Image.fromarray((mask * 255).numpy().astype(np.uint8))
    x1, y1, x2, y2 = VaeImageProcessor.get_crop_region(picture, size[1], size[0], pad=padding)
    # It cuts off fractions of a pixel, which are rounded here.
    assert np.abs(np.subtract(ours, (y1, x1, y2 - y1, x2 - x1))).max() <= 1
    assert ours.top >= 0
    assert ours.top + ours.height <= height
    assert ours.left >= 0
    assert ours.left + ours.width <= width
    assert ours.of(mask).sum() == mask.sum()


def test_a_blur_is_a_gaussian_and_ends() -> None:
    mask = masked(20, 60, Box(0, 0, 20, 30))
    soft = blurred(mask, 2.0)
    distance = torch.arange(60) + 0.5 - 30
    expected = torch.special.ndtr(-distance / 2.0)
    assert (soft[0, 0, 10] - expected).abs().max() < 0.01
    assert (soft[..., 36:] == 0).all()
    assert (soft[..., :24] > 1 - 1e-6).all()
    # The border of the image is no border of the mask.
    assert torch.equal(soft[0, 0, 0], soft[0, 0, 10])
    assert blurred(mask, 0) is mask


def test_what_is_shown_goes_back_to_where_it_came_from() -> None:
    ramp = torch.linspace(0, 1, 90).expand(1, 3, 70, 90).contiguous()
    mask = masked(70, 90, Box(20, 40, 10, 15))
    canvas = Canvas.from_images(ramp, mask, size=(64, 96), padding=4, blur=0)
    size = canvas.model_inputs()
    assert size.shape == (1, 3, 64, 96)
    back = canvas.composite(size / 2 + 0.5)
    assert (back - ramp).abs().max() < 2e-3
    painted = canvas.composite(torch.full_like(size, 0.25))
    assert torch.equal(painted[mask.expand_as(painted) == 0], ramp[mask.expand_as(ramp) == 0])
    assert (painted[mask.expand_as(painted) == 1] - 0.25).abs().max() < 1e-6


def test_several_answers_of_an_image_stand_together() -> None:
    images, masks = torch.rand(2, 3, 8, 8), masked(8, 8, Box(0, 0, 4, 4)).expand(2, 1, 8, 8)
    canvas = Canvas.from_images(images, masks, size=(8, 8), padding=None, blur=0)
    assert torch.equal(canvas.model_inputs(), images * 2 - 1)
    assert torch.equal(canvas.model_masks(), masks)
    answers = torch.rand(4, 3, 8, 8)
    results = canvas.composite(answers)
    for index, result in enumerate(results):
        assert torch.equal(result[:, :4, :4], answers[index, :, :4, :4])
        assert torch.equal(result[:, 4:], images[index // 2, :, 4:])


def test_thin_marks_survive_shrinking() -> None:
    mask = masked(64, 64, Box(0, 31, 64, 1))
    canvas = Canvas.from_images(torch.rand(1, 3, 64, 64), mask, size=(8, 8), padding=None, blur=0)
    assert canvas.model_masks()[0, 0].any(dim=0).sum() == 1
