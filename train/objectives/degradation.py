"""What is done to the images that a model is shown in training: it learns to undo it.

Each is a function of an RGB image and a generator of random numbers, and leaves the image that it is given as it is.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from io import BytesIO

from PIL import Image, ImageDraw, ImageFilter

from latentgen.train.config import Degradation

# Mid-grey stands where something is missing, as 0 does in the model's -1..1: it takes nobody's part.
MISSING = (128, 128, 128)
KERNELS = (
    Image.Resampling.BOX,
    Image.Resampling.BILINEAR,
    Image.Resampling.BICUBIC,
    Image.Resampling.LANCZOS,
)
BLURRED = 0.2
# Standard deviation of the strongest blur, in pixels of the low-resolution image.
MAX_BLUR = 0.4
# The lowest is that of Palette (arXiv:2111.05826).
JPEG_QUALITIES = (5, 40)
# The widest margin over the side of the image: of an image without its four margins a fifth is left each way.
MAX_MARGIN = 0.4


def lower_resolution(image: Image.Image, side: int, rng: random.Random) -> Image.Image:
    """The image in low resolution, as cameras and programs make it: a random kernel, sometimes after a slight blur."""
    if rng.random() < BLURRED:
        blur = rng.uniform(0.0, MAX_BLUR) * image.width / side
        image = image.filter(ImageFilter.GaussianBlur(blur))
    return image.resize((side, side), rng.choice(KERNELS))


def without_colour(image: Image.Image, _: random.Random) -> Image.Image:
    """The image's luma (ITU-R BT.601)."""
    return image.convert("L").convert("RGB")


def without_margins(image: Image.Image, rng: random.Random) -> Image.Image:
    """The image within one to four margins of random width, at random sides."""
    width, height = image.size
    margins = dict.fromkeys(("left", "top", "right", "bottom"), 0)
    for place in rng.sample(tuple(margins), rng.randint(1, len(margins))):
        along = width if place in ("left", "right") else height
        margins[place] = rng.randint(1, max(1, int(MAX_MARGIN * along)))
    box = (margins["left"], margins["top"], width - margins["right"], height - margins["bottom"])
    result = Image.new("RGB", image.size, MISSING)
    result.paste(image.crop(box), box)
    return result


def compressed(image: Image.Image, rng: random.Random) -> Image.Image:
    """The image as a JPEG file of random low quality shows it."""
    file = BytesIO()
    image.save(file, "JPEG", quality=rng.randint(*JPEG_QUALITIES))
    return Image.open(file).convert("RGB")


def with_holes(image: Image.Image, rng: random.Random) -> Image.Image:
    """The image with one to three holes: rectangles, and strokes as of a brush (arXiv:1806.03589)."""
    result = image.copy()
    canvas = ImageDraw.Draw(result)
    width, height = image.size
    for _ in range(rng.randint(1, 3)):
        if rng.random() < 0.5:
            right, lower = (max(1, round(rng.uniform(0.15, 0.5) * side)) for side in image.size)
            left, top = rng.randint(0, width - right), rng.randint(0, height - lower)
            canvas.rectangle((left, top, left + right - 1, top + lower - 1), fill=MISSING)
        else:
            corners = [(rng.uniform(0, width), rng.uniform(0, height)) for _ in range(rng.randint(2, 5))]
            thickness = max(1, round(rng.uniform(0.06, 0.2) * min(image.size)))
            canvas.line(corners, fill=MISSING, width=thickness, joint="curve")
    return result


DEGRADATIONS: Mapping[Degradation, Callable[[Image.Image, random.Random], Image.Image]] = {
    "colorization": without_colour,
    "uncropping": without_margins,
    "jpeg": compressed,
    "inpainting": with_holes,
}
# Those that draw no random number: what they make of an image is always the same.
NOT_RANDOM: frozenset[Degradation] = frozenset({"colorization"})
