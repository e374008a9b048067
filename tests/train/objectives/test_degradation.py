"""Degradations of conditioning images, and random masks."""

from __future__ import annotations

import random
from collections import Counter
from io import BytesIO
from typing import get_args

import numpy as np
import pytest
from PIL import Image

from latentgen.train.config import Degradation
from latentgen.train.objectives.degradation import (
    DEGRADATIONS,
    DETERMINISTIC,
    KERNELS,
    MISSING,
    lower_resolution,
)

SIZES = [(32, 32), (40, 24), (8, 8)]


def picture(size: tuple[int, int] = (32, 32)) -> Image.Image:
    """Random pixels, none of which is mid-grey."""
    width, height = size
    return Image.fromarray(np.random.default_rng(0).integers(0, 128, (height, width, 3), dtype=np.uint8))


def missing(image: Image.Image, degraded: Image.Image) -> np.ndarray:
    """Where nothing is left of the image, [H, W]; everywhere else it is as it was."""
    before, after = np.asarray(image), np.asarray(degraded)
    gone = (after == MISSING).all(axis=-1)
    assert np.array_equal(after[~gone], before[~gone])
    return gone


def test_every_degradation_is_there():
    assert set(DEGRADATIONS) == set(get_args(Degradation))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", get_args(Degradation))
def test_the_generator_decides_and_the_image_stays(name: Degradation, size: tuple[int, int]):
    image, degrade = picture(size), DEGRADATIONS[name]
    results = [degrade(image, random.Random(seed)) for seed in range(20)]
    assert all((result.size, result.mode) == (size, "RGB") for result in results)
    again = [degrade(image, random.Random(seed)) for seed in range(20)]
    assert [result.tobytes() for result in results] == [result.tobytes() for result in again]
    different = len({result.tobytes() for result in results})
    assert different == 1 if name in DETERMINISTIC else different > 10
    assert image.tobytes() == picture(size).tobytes()
    assert all(result.tobytes() != image.tobytes() for result in results)


def test_what_has_no_colour_is_grey():
    image = picture()
    degrade = DEGRADATIONS["colorization"]
    grey = degrade(image, random.Random(0))
    levels = np.asarray(grey).astype(float)
    assert np.ptp(levels, axis=-1).max() == 0
    assert np.abs(levels[..., 0] - np.asarray(image) @ [0.299, 0.587, 0.114]).max() < 1
    assert degrade(grey, random.Random(0)).tobytes() == grey.tobytes()


@pytest.mark.parametrize("size", SIZES)
def test_one_to_four_margins_are_cropped(size: tuple[int, int]):
    image = picture(size)
    margins = []
    for seed in range(300):
        gone = missing(image, DEGRADATIONS["uncropping"](image, random.Random(seed)))
        columns, rows = np.flatnonzero(~gone.all(axis=0)), np.flatnonzero(~gone.all(axis=1))
        assert not gone[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].any()
        margins.append((columns[0], size[0] - 1 - columns[-1], rows[0], size[1] - 1 - rows[-1]))
    counts = Counter(sum(margin > 0 for margin in four) for four in margins)
    assert set(counts) == {1, 2, 3, 4}
    assert min(counts.values()) > 40
    limits = [int(0.4 * side) for side in (size[0], size[0], size[1], size[1])]
    assert [max(widths) for widths in zip(*margins, strict=True)] == limits


def test_jpeg_files_of_low_quality():
    image = picture()

    def at(quality: int) -> bytes:
        file = BytesIO()
        image.save(file, "JPEG", quality=quality)
        return Image.open(file).convert("RGB").tobytes()

    expected = {at(quality): quality for quality in range(1, 101)}
    found = {expected[DEGRADATIONS["jpeg"](image, random.Random(seed)).tobytes()] for seed in range(300)}
    assert found == set(range(5, 41))


@pytest.mark.parametrize("size", SIZES)
def test_holes_are_grey_and_the_rest_is_untouched(size: tuple[int, int]):
    image = picture(size)
    holes = [missing(image, DEGRADATIONS["inpainting"](image, random.Random(seed))) for seed in range(300)]
    shares = np.array([hole.mean() for hole in holes])
    assert shares.min() > 0
    assert shares.max() < 0.9
    assert 0.1 < shares.mean() < 0.4
    assert np.any(holes, axis=0).all()  # they may be anywhere
    rectangles = [hole[np.ix_(hole.any(axis=1), hole.any(axis=0))].all() for hole in holes]
    assert 0.1 < np.mean(rectangles) < 0.5  # those with a single hole, and that one no stroke


def test_images_in_low_resolution_are_resampled_by_every_kernel():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    plain = {image.resize((16, 16), kernel).tobytes(): kernel for kernel in KERNELS}
    found = [plain.get(lower_resolution(image, 16, random.Random(i)).tobytes()) for i in range(400)]
    counts = Counter(found)
    assert counts.pop(None) == pytest.approx(0.2 * 400, abs=30)  # blurred
    assert set(counts) == set(KERNELS)
    assert min(counts.values()) > 50
