"""Buckets, and how images are scaled, mirrored and cropped into them."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from latentgen.train.config import ImageData
from latentgen.train.data.cropping import Cropper, bucket_sizes, nearest_size

# Height x width of the buckets of SDXL (arXiv:2307.01952, appendix I), those wider than high.
SDXL = {
    *((512, width) for width in (2048, 1984, 1920, 1856)),
    *((576, width) for width in (1792, 1728, 1664)),
    *((640, width) for width in (1600, 1536)),
    *((704, width) for width in (1472, 1408, 1344)),
    *((768, width) for width in (1344, 1280)),
    *((832, width) for width in (1216, 1152)),
    *((896, width) for width in (1152, 1088)),
    *((960, width) for width in (1088, 1024)),
    (1024, 1024),
}
sides = st.integers(1, 5000)


def cropper(**fields: Any) -> Cropper:
    return Cropper(ImageData(**{"image_size": 64, "bucket_step": 16} | fields))


def test_buckets_are_among_those_of_sdxl():
    ours = bucket_sizes(1024, 64, 512, 2048)
    assert {tuple(sorted(size)) for size in ours} <= SDXL
    assert set(ours) == {size[::-1] for size in ours}, "each stands upright and lies on its side"
    # Every side of the paper is there; of a side the paper has up to four lengths of the other.
    assert {side for size in ours for side in size} == {side for size in SDXL for side in size}
    assert Cropper(ImageData(image_size=1024, buckets=True)).sizes == ours


@given(st.integers(64, 1024), st.sampled_from([8, 16, 32, 64]), st.integers(1, 64), st.integers(1, 3))
def test_sides_and_areas_keep_their_bounds(image_size: int, step: int, shortest: int, double: int):
    longest = image_size * double
    sizes = bucket_sizes(image_size, step, shortest, longest)
    square = image_size // step * step
    assert (square, square) in sizes
    assert len(set(sizes)) == len(sizes)
    for height, width in sizes:
        assert height % step == width % step == 0
        assert shortest <= min(height, width) <= max(height, width) <= longest
        assert height * width <= image_size**2
        # The area leaves no room for another step of both sides.
        assert (height + step) * (width + step) > image_size**2 or longest - max(height, width) < step


@given(sides, sides)
def test_an_image_goes_to_the_nearest_ratio(height: int, width: int):
    sizes = bucket_sizes(512, 64, 256, 1024)
    chosen = nearest_size((height, width), sizes)

    # In whole numbers: of two quotients of ratios, each above 1, the chosen is not the larger.
    def cross(size: tuple[int, int]) -> tuple[int, int]:
        return max(size[0] * width, size[1] * height), min(size[0] * width, size[1] * height)

    above, below = cross(chosen)
    assert all(above * cross(size)[1] <= cross(size)[0] * below for size in sizes)
    assert nearest_size((width, height), sizes) == chosen[::-1]


def test_of_equal_ratios_the_largest_and_beyond_all_the_outermost():
    assert nearest_size((100, 200), ((32, 64), (64, 128), (48, 96))) == (64, 128)
    sizes = bucket_sizes(512, 64, 256, 1024)
    assert nearest_size((1, 5000), sizes) == (256, 1024)
    assert nearest_size((5000, 4999), sizes) == (512, 512)


@given(sides, sides, st.booleans(), st.sampled_from(["center", "random"]), st.booleans(), st.integers(0, 9))
def test_views_are_covered_and_no_larger_than_need_be(
    height: int, width: int, buckets: bool, crop: str, mirror: bool, seed: int
):
    frames = cropper(buckets=buckets, crop=crop, horizontal_flip=mirror)
    frame = frames.draw((height, width), random.Random(seed))
    assert frame.size == frames.size_for((height, width))
    room = [scaled - side for scaled, side in zip(frame.scaled, frame.size, strict=True)]
    assert min(room) == 0, "one side fits, as the shorter of the two"
    assert all(0 <= corner <= free for corner, free in zip(frame.corner, room, strict=True))
    assert mirror or not frame.mirrored
    drawn = {frames.draw((100, 200), random.Random(number)) for number in range(50)}
    assert (len(drawn) > 1) == frames.varies
    scale = max(side / whole for side, whole in zip(frame.size, (height, width), strict=True))
    for scaled, whole, side in zip(frame.scaled, (height, width), frame.size, strict=True):
        assert abs(scaled - whole * scale) <= 0.5 or scaled == side
    if crop == "center":
        assert list(frame.corner) == [free // 2 for free in room]


def test_views_are_the_scaled_image_mirrored_and_then_cropped():
    """In this order, as diffusers' SDXL script does: the corner that the UNet is told is that in the mirrored image."""
    image = Image.effect_noise((90, 60), 80).convert("RGB")
    scaled = image.resize((96, 64), Image.Resampling.LANCZOS)
    frames = cropper(crop="random", horizontal_flip=True)
    drawn = [frames.draw((60, 90), random.Random(seed)) for seed in range(6)]
    assert {frame.mirrored for frame in drawn} == {True, False}
    for frame in drawn:
        assert frame.scaled == (64, 96)
        whole = np.asarray(ImageOps.mirror(scaled) if frame.mirrored else scaled)
        top, left = frame.corner
        np.testing.assert_array_equal(np.asarray(frame.apply(image)), whole[top : top + 64, left : left + 64])


def test_random_crops_and_mirrors_are_uniform():
    frames = cropper(crop="random", horizontal_flip=True)
    drawn = [frames.draw((64, 67), random.Random(seed)) for seed in range(2000)]
    lefts = Counter(frame.corner[1] for frame in drawn)
    assert sorted(lefts) == [0, 1, 2, 3]
    assert all(count / 2000 == pytest.approx(0.25, abs=0.04) for count in lefts.values())
    assert sum(frame.mirrored for frame in drawn) / 2000 == pytest.approx(0.5, abs=0.04)
    assert {frame.corner[0] for frame in drawn} == {0}
