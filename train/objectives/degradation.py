"""Degradations of conditioning images, which a model learns to undo, and random masks.

A degradation is a function of an RGB image and a random generator; it does not change its input.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from io import BytesIO

from PIL import Image, ImageDraw, ImageFilter

from latentgen.train.config import Degradation

# Mid-gray fills what is missing: it is 0 in the model's -1..1.
MISSING = (128, 128, 128)
KERNELS = (
    Image.Resampling.BOX,
    Image.Resampling.BILINEAR,
    Image.Resampling.BICUBIC,
    Image.Resampling.LANCZOS,
)
BLUR_RATE = 0.2
# Standard deviation of the strongest blur, in pixels of the low-resolution image.
MAX_BLUR = 0.4
# The lowest is that of Palette (arXiv:2111.05826).
JPEG_QUALITIES = (5, 40)
# The widest margin as a fraction of the side: with all four, a fifth of each side is left.
MAX_MARGIN = 0.4


def lower_resolution(image: Image.Image, side: int, rng: random.Random) -> Image.Image:
    """The image in low resolution, `side` pixels wide: by a random kernel, sometimes after a slight blur."""
    if rng.random() < BLUR_RATE:
        blur = rng.uniform(0.0, MAX_BLUR) * image.width / side
        image = image.filter(ImageFilter.GaussianBlur(blur))
    return image.resize((side, side), rng.choice(KERNELS))


def to_gray(image: Image.Image, _: random.Random) -> Image.Image:
    """The image's luma (ITU-R BT.601)."""
    return image.convert("L").convert("RGB")


def crop_margins(image: Image.Image, rng: random.Random) -> Image.Image:
    """The image with gray margins of random width on one to four random sides."""
    width, height = image.size
    margins = dict.fromkeys(("left", "top", "right", "bottom"), 0)
    for place in rng.sample(tuple(margins), rng.randint(1, len(margins))):
        along = width if place in ("left", "right") else height
        margins[place] = rng.randint(1, max(1, int(MAX_MARGIN * along)))
    box = (margins["left"], margins["top"], width - margins["right"], height - margins["bottom"])
    result = Image.new("RGB", image.size, MISSING)
    result.paste(image.crop(box), box)
    return result


def compress_jpeg(image: Image.Image, rng: random.Random) -> Image.Image:
    """The image compressed to a JPEG of random low quality."""
    file = BytesIO()
    image.save(file, "JPEG", quality=rng.randint(*JPEG_QUALITIES))
    return Image.open(file).convert("RGB")


def cut_holes(image: Image.Image, rng: random.Random) -> Image.Image:
    """The image with one to three holes: rectangles, and brush strokes (arXiv:1806.03589)."""
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
    "colorization": to_gray,
    "uncropping": crop_margins,
    "jpeg": compress_jpeg,
    "inpainting": cut_holes,
}
# Degradations that use no random numbers.
DETERMINISTIC: frozenset[Degradation] = frozenset({"colorization"})

# How often the published inpainting models were trained with the whole image masked.
WHOLE_IMAGE = 0.25
_MOST_SHAPES = 3
_WHITE = 255


def random_mask(size: tuple[int, int], rng: random.Random) -> Image.Image:
    """A mask "L" of `size` (width, height), never empty: 255 where the image is to be painted.

    The shapes are those of arXiv:2109.07161 (section 2.3, wide masks): boxes and thick strokes; and ellipses.
    """
    if rng.random() < WHOLE_IMAGE:
        return Image.new("L", size, _WHITE)
    mask = Image.new("L", size, 0)
    draw = ImageDraw.Draw(mask)
    for _ in range(rng.randint(1, _MOST_SHAPES)):
        shape = rng.choice((draw.rectangle, draw.ellipse, None))
        if shape is None:
            _stroke(draw, size, rng)
        else:
            shape(_box(size, rng), fill=_WHITE)
    return mask


def _box(size: tuple[int, int], rng: random.Random) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a box from a tenth to two thirds of the image's sides, centered inside it."""
    sides = [max(1, round(rng.uniform(0.1, 0.67) * side)) for side in size]
    corner = [rng.randrange(side) - own // 2 for side, own in zip(size, sides, strict=True)]
    return corner[0], corner[1], corner[0] + sides[0], corner[1] + sides[1]


def _stroke(draw: ImageDraw.ImageDraw, size: tuple[int, int], rng: random.Random) -> None:
    """A bent line of round ends, as thick as a tenth to a quarter of the shorter side."""
    width = max(1, round(rng.uniform(0.1, 0.25) * min(size)))
    points = [(rng.randrange(size[0]), rng.randrange(size[1])) for _ in range(rng.randint(2, 5))]
    draw.line(points, fill=_WHITE, width=width, joint="curve")
    for x, y in (points[0], points[-1]):
        draw.ellipse((x - width // 2, y - width // 2, x + width // 2, y + width // 2), fill=_WHITE)
