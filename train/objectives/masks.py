"""Random masks to train inpainting with: boxes, ellipses and brush strokes, or the whole image."""

from __future__ import annotations

import random

from PIL import Image, ImageDraw

# The published inpainting models were shown the whole image masked so often.
WHOLE_IMAGE = 0.25
_MOST_SHAPES = 3
_WHITE = 255


def random_mask(size: tuple[int, int], rng: random.Random) -> Image.Image:
    """A mask "L" of `size` (width, height): 255 where the image is to be painted, which is somewhere.

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
    """Left, top, right and bottom of a box from a tenth to two thirds of the image's sides, centred inside it."""
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
