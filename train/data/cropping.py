"""Views of images of any size: the rectangle of an image, and how it is scaled, mirrored and cropped to it."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from PIL import Image, ImageOps

from latentgen.train.config import ImageData
from latentgen.train.data import Captions, Sample

Size = tuple[int, int]
"""Height and width in pixels."""


class Crop(NamedTuple):
    """A view of an image: scaled to a size, mirrored or not, and then cropped at a corner (top, left) to a size."""

    scaled: Size
    corner: Size
    size: Size
    mirrored: bool

    def apply(
        self, image: Image.Image, resampling: Image.Resampling = Image.Resampling.LANCZOS
    ) -> Image.Image:
        """The view of an image, or of a mask of the same size."""
        (height, width), (top, left) = self.scaled, self.corner
        scaled = image.resize((width, height), resampling)
        if self.mirrored:
            scaled = ImageOps.mirror(scaled)
        return scaled.crop((left, top, left + self.size[1], top + self.size[0]))


class Cropper:
    """Makes samples as a recipe says: sizes, crops, mirroring, and changes of captions.

    Attributes:
        sizes: the possible sizes of views.
        varies: whether two views of an image can differ.
    """

    def __init__(self, config: ImageData) -> None:
        self._config = config
        self.sizes: tuple[Size, ...] = ((config.image_size, config.image_size),)
        if config.buckets:
            self.sizes = bucket_sizes(config.image_size, config.bucket_step, *config.side_bounds)
        self.varies = config.crop == "random" or config.horizontal_flip
        self._shuffle_after = config.keep_tokens if config.caption_shuffle else None

    def size_for(self, original: Size) -> Size:
        """The size of the views of an image of this size; (0, 0) is an unknown size, allowed without buckets."""
        return self.sizes[0] if len(self.sizes) == 1 else nearest_size(original, self.sizes)

    def texts(self, captions: Sequence[str]) -> tuple[str, ...]:
        """The captions with the recipe's prefix."""
        prefix = self._config.caption_prefix
        return tuple(f"{prefix} {caption}".strip() if prefix else caption for caption in captions)

    def sample(
        self,
        image: Image.Image,
        captions: Sequence[str],
        rng: random.Random,
        *,
        mask: Image.Image | None = None,
        before: Image.Image | None = None,
    ) -> Sample:
        """One crop of an image, of its mask and of the image before the edit, with equally likely captions.

        The crop is random if the recipe asks for random crops or mirroring.
        """
        original = (image.height, image.width)
        crop = self.draw(original, rng)
        if mask is not None:
            # Lanczos would draw rings around the borders of a mask.
            mask = crop.apply(mask.convert("L"), Image.Resampling.BILINEAR)
        if before is not None:
            before = crop.apply(before)
        texts = self.texts(captions)
        drawn_from = Captions(texts, (1.0,) * len(texts), self._shuffle_after)
        return Sample(crop.apply(image), drawn_from, original, crop.corner, mask, before)

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

    They are the square and, for each side from `shortest` to `longest`, the longest other side that fits the
    area; each rectangle is there in portrait and in landscape. At 1024 and 64 they are among those of SDXL
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


@lru_cache(2**16)
def nearest_size(original: Size, sizes: tuple[Size, ...]) -> Size:
    """The size with the nearest aspect ratio, compared by quotient so that portrait and landscape are treated alike.

    If several sizes have that ratio, it is the largest of them.
    """
    ratio = math.log(original[0] / original[1])

    def distance(size: Size) -> tuple[float, int, Size]:
        # Rounded, because logarithms of equal ratios differ in their last digits.
        return round(abs(math.log(size[0] / size[1]) - ratio), 9), -size[0] * size[1], size

    return min(sizes, key=distance)


def enlargement(original: Size, size: Size) -> float:
    """The factor by which an image is scaled to cover a view: above 1 if it is smaller."""
    return max(size[0] / original[0], size[1] / original[1])
