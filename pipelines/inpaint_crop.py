"""Crops the part of an image to repaint, and composites the result into the image; other pixels do not change."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# A blur is exactly zero beyond this many standard deviations.
_BLUR_REACH = 3

Pair = tuple[int, int]


class Box(NamedTuple):
    """A rectangle of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int

    def of(self, images: Tensor) -> Tensor:
        """Crop images [..., H, W]; a view."""
        return images[..., self.top : self.top + self.height, self.left : self.left + self.width]


@dataclass(frozen=True, eq=False)
class Canvas:
    """Images to repaint: the model's inputs, and how its output is composited into them.

    Attributes:
        originals: float32 [B, 3, H, W] in 0..1.
        masks: float32 [B, 1, H, W], 1 where the images are repainted, 0 elsewhere.
        weights: float32 [B, 1, H, W] in 0..1, the opacity of the repainted image; pixels with 0 do not change.
        boxes: the crop of each image that the model gets.
        size: height and width of the model's input, which crops are resized to fit into.
    """

    originals: Tensor
    masks: Tensor
    weights: Tensor
    boxes: tuple[Box, ...]
    size: Pair

    @classmethod
    def from_images(
        cls, originals: Tensor, masks: Tensor, *, size: Pair, padding: int | None, blur: float
    ) -> Canvas:
        """A canvas for images and masks, none of which may be empty.

        Args:
            originals, masks, size: see Canvas.
            padding: crop to the mask plus this many pixels; None does not crop.
            blur: standard deviation in pixels of the Gaussian blur of `weights`.
        """
        if padding is None:
            boxes = (Box(0, 0, originals.shape[2], originals.shape[3]),) * len(originals)
        else:
            boxes = tuple(mask_bbox(mask[0], padding, size[1] / size[0]) for mask in masks)
        return cls(originals, masks, blurred(masks, blur), boxes, size)

    def model_inputs(self) -> Tensor:
        """The crops that the model gets, float32 [B, 3, h, w] in -1..1."""
        parts = [
            self._padded(_resized(box.of(image), self._fitted_size(box)))
            for image, box in zip(self.originals.split(1), self.boxes, strict=True)
        ]
        return torch.cat(parts) * 2 - 1

    def model_masks(self) -> Tensor:
        """The masks of the crops, float32 [B, 1, h, w]: 1 where any of the pixels resized to it is masked."""
        parts = [
            self._padded((F.interpolate(box.of(mask), self._fitted_size(box), mode="area") > 0).float())
            for mask, box in zip(self.masks.split(1), self.boxes, strict=True)
        ]
        return torch.cat(parts)

    def composite(self, painted: Tensor) -> Tensor:
        """Composite `painted` [N, 3, h, w] in 0..1 into the images: [N, 3, H, W] in 0..1 on the device of `painted`.

        N is a multiple of the number of images; the results of one image are adjacent.
        """
        each = len(painted) // len(self.originals)
        results = []
        for index, outputs in enumerate(painted.split(each)):
            box = self.boxes[index]
            height, width = self._fitted_size(box)
            original = self.originals[index].to(painted.device)
            results.append(original.repeat(each, 1, 1, 1))
            part = box.of(results[-1])
            output = _resized(outputs[..., :height, :width], (box.height, box.width))
            # Exact at weight 0, which leaves the original.
            part.lerp_(output, box.of(self.weights[index]).to(painted.device))
        return torch.cat(results)

    def _fitted_size(self, box: Box) -> Pair:
        """The size of a crop after resizing, with its aspect ratio."""
        scale = min(self.size[0] / box.height, self.size[1] / box.width)
        return max(round(box.height * scale), 1), max(round(box.width * scale), 1)

    def _padded(self, part: Tensor) -> Tensor:
        """Pad a crop to the size of the model's input, by repeating its right and lower borders."""
        missing = (0, self.size[1] - part.shape[3], 0, self.size[0] - part.shape[2])
        return F.pad(part, missing, mode="replicate")


def mask_bbox(mask: Tensor, padding: int, ratio: float) -> Box:
    """The bounding box of a mask [H, W] plus padding, grown inside the image towards width / height = `ratio`."""
    sides = []
    for line in (mask.any(dim=1), mask.any(dim=0)):
        inside = line.nonzero()
        start, stop = int(inside[0]) - padding, int(inside[-1]) + 1 + padding
        sides.append((max(start, 0), min(stop, len(line)), len(line)))
    (top, bottom, image_height), (left, right, image_width) = sides
    height = max(bottom - top, round((right - left) / ratio))
    width = max(right - left, round((bottom - top) * ratio))
    top, height = _grown(top, bottom, image_height, height)
    left, width = _grown(left, right, image_width, width)
    return Box(top, left, height, width)


def blurred(masks: Tensor, deviation: float) -> Tensor:
    """Blur masks [B, 1, H, W] with a Gaussian; exactly 0 or 1 beyond three standard deviations."""
    if deviation == 0:
        return masks
    reach = math.ceil(_BLUR_REACH * deviation)
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / deviation).square())
    kernel = (kernel / kernel.sum()).view(1, 1, 1, -1)
    spread = F.conv2d(F.pad(masks, (reach, reach, 0, 0), mode="replicate"), kernel)
    return F.conv2d(F.pad(spread, (0, 0, reach, reach), mode="replicate"), kernel.mT).clamp(0, 1)


def _grown(start: int, stop: int, limit: int, target: int) -> Pair:
    """Start and length of an interval of `target` pixels around start..stop, inside 0..limit."""
    length = min(target, limit)
    begin = start - (length - (stop - start)) // 2
    return min(max(begin, 0), limit - length), length


def _resized(images: Tensor, size: Pair) -> Tensor:
    if images.shape[2:] == size:
        return images
    return F.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)
