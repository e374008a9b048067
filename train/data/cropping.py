"""Views of images of any size: which rectangle an image goes to, and how it is scaled, mirrored and cropped to it."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageOps

from latentgen.train.config import ImageData

Size = tuple[int, int]
"""Height and width in pixels."""


class Crop(NamedTuple):
    """What of an image a view shows.

    Attributes:
        scaled: the size that the whole image is scaled to.
        corner: top and left of the view in the scaled image, after mirroring if it is mirrored.
        size: the size of the view.
        mirrored: whether left and right change sides.
    """

    scaled: Size
    corner: Size
    size: Size
    mirrored: bool

    def show(
        self, image: Image.Image, resampling: Image.Resampling = Image.Resampling.LANCZOS
    ) -> Image.Image:
        """The view of an image, or of a mask of the same size."""
        (height, width), (top, left) = self.scaled, self.corner
        scaled = image.resize((width, height), resampling)
        if self.mirrored:
            scaled = ImageOps.mirror(scaled)
        return scaled.crop((left, top, left + self.size[1], top + self.size[0]))


class Cropper:
    """What a recipe says of sizes and crops.

    Attributes:
        sizes: those that views can have.
        varies: whether two views of an image can differ.
    """

    def __init__(self, config: ImageData) -> None:
        self._config = config
        square = (config.image_size, config.image_size)
        shortest, longest = config.side_bounds
        self.sizes: tuple[Size, ...] = (
            bucket_sizes(config.image_size, config.bucket_step, shortest, longest)
            if config.buckets
            else (square,)
        )
        self.varies = config.crop == "random" or config.horizontal_flip

    def size_for(self, original: Size) -> Size:
        """The size of the views of an image of this size."""
        return nearest_size(original, self.sizes)

    def draw(self, original: Size, rng: random.Random) -> Crop:
        """A view of an image of this size; random if the recipe asks for random crops or mirroring."""
        size = self.size_for(original)
        scale = enlargement(original, size)
        height, width = (max(side, round(whole * scale)) for whole, side in zip(original, size, strict=True))
        room = (height - size[0], width - size[1])
        mirrored = self._config.horizontal_flip and rng.random() < 0.5
        if self._config.crop == "random":
            corner = (rng.randint(0, room[0]), rng.randint(0, room[1]))
        else:
            corner = (room[0] // 2, room[1] // 2)
        return Crop((height, width), corner, size, mirrored)


def bucket_sizes(image_size: int, step: int, shortest: int, longest: int) -> tuple[Size, ...]:
    """The rectangles with sides of multiples of `step` and an area of at most `image_size` squared.

    They are the square and, for each side from `shortest` to `longest`, the longest other one that the area has room
    for; with each rectangle there is the one that lies on its side. At 1024 and 64 they are among those of SDXL
    (arXiv:2307.01952, appendix I).
    """
    multiples = range(-(-shortest // step) * step, longest + 1, step)
    square = image_size // step * step
    sizes: set[Size] = {(square, square)}
    for side in multiples:
        other = min(image_size**2 // side, longest) // step * step
        if other >= shortest:
            sizes |= {(side, other), (other, side)}
    return tuple(sorted(sizes))


def nearest_size(original: Size, sizes: Sequence[Size]) -> Size:
    """The size of the nearest ratio of sides, by quotient so that upright and lying images fare alike.

    Of sizes of one ratio it is the largest.
    """
    ratio = math.log(original[0] / original[1])

    def distance(size: Size) -> tuple[float, int, Size]:
        # Rounded, for logarithms of equal ratios differ in their last digits.
        return round(abs(math.log(size[0] / size[1]) - ratio), 9), -size[0] * size[1], size

    return min(sizes, key=distance)


def enlargement(original: Size, size: Size) -> float:
    """By how much an image is scaled so that it covers a view: above 1 if it is smaller."""
    return max(size[0] / original[0], size[1] / original[1])
