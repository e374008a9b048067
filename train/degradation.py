"""What is done to the images that a model is shown in training: it learns to undo it.

Each is a function of an RGB image and a generator of random numbers, and leaves the image that it is given as it is.
"""

from __future__ import annotations

import random

from PIL import Image, ImageFilter

KERNELS = (
    Image.Resampling.BOX,
    Image.Resampling.BILINEAR,
    Image.Resampling.BICUBIC,
    Image.Resampling.LANCZOS,
)
BLURRED = 0.2
# Standard deviation of the strongest blur, in pixels of the low-resolution image.
MAX_BLUR = 0.4


def lower_resolution(image: Image.Image, side: int, rng: random.Random) -> Image.Image:
    """The image in low resolution, as cameras and programs make it: a random kernel, sometimes after a slight blur."""
    if rng.random() < BLURRED:
        blur = rng.uniform(0.0, MAX_BLUR) * image.width / side
        image = image.filter(ImageFilter.GaussianBlur(blur))
    return image.resize((side, side), rng.choice(KERNELS))
