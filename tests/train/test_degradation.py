"""What is done to the images that a model is shown."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from latentgen.train.degradation import KERNELS, lower_resolution


def test_images_in_low_resolution_are_resampled_by_every_kernel():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    plain = {image.resize((16, 16), kernel).tobytes(): kernel for kernel in KERNELS}
    found = [plain.get(lower_resolution(image, 16, random.Random(i)).tobytes()) for i in range(400)]
    counts = Counter(found)
    assert counts.pop(None) == pytest.approx(0.2 * 400, abs=30)  # blurred
    assert set(counts) == set(KERNELS)
    assert min(counts.values()) > 50
