"""The part of an image that a model paints on, and the way back into the image, whose other pixels stay as they are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Beyond so many standard deviations a blur is exactly nothing.
_BLUR_REACH = 3

Pair = tuple[int, int]


class Box(NamedTuple):
    """A part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int

    def of(self, images: Tensor) -> Tensor:
        """The part of images [..., H, W]; a view."""
        return images[..., self.top : self.top + self.height, self.left : self.left + self.width]


@dataclass(frozen=True, eq=False)
class Canvas:
    """What a model is shown of images, and what of its answer returns into them.

    Attributes:
        originals: float32 [B, 3, H, W] in 0..1.
        masks: float32 [B, 1, H, W], 1 where the images are painted anew, 0 elsewhere.
        weights: float32 [B, 1, H, W] in 0..1, how much of what was painted shows; where it is 0, pixels stay.
        boxes: of each image, the part that is shown.
        size: height and width of what is shown. Smaller parts are resized to fit into it.
        resizes: whether the parts are resized; else they are of that size.
    """

    originals: Tensor
    masks: Tensor
    weights: Tensor
    boxes: tuple[Box, ...]
    size: Pair
    resizes: bool

    @classmethod
    def spanned(
        cls, originals: Tensor, masks: Tensor, *, size: Pair | None, padding: int | None, blur: float
    ) -> Canvas:
        """A canvas over images and masks.

        Args:
            originals: see Canvas.
            masks: likewise; none is empty.
            size: that the images are resized to; None leaves them as they are, if there is no padding.
            padding: show no more than what the mask marks and so many pixels around it; None shows all.
            blur: standard deviation in pixels of the Gaussian that softens the border of what is painted.
        """
        whole = Box(0, 0, originals.shape[2], originals.shape[3])
        shown = whole[2:] if size is None else size
        if padding is None:
            boxes = (whole,) * len(originals)
        else:
            boxes = tuple(mask_bbox(mask[0], padding, shown[1] / shown[0]) for mask in masks)
        return cls(originals, masks, blurred(masks, blur), boxes, shown, resizes=size is not None)

    def model_inputs(self) -> Tensor:
        """What the model is shown, float32 [B, 3, h, w] in -1..1."""
        parts = [
            self._filled(_resized(box.of(image), self._fit(box)))
            for image, box in zip(self.originals.split(1), self.boxes, strict=True)
        ]
        return torch.cat(parts) * 2 - 1

    def model_masks(self) -> Tensor:
        """The masks of what is shown, float32 [B, 1, h, w]: 1 where any of the pixels that meet there is marked."""
        parts = [
            self._filled((F.interpolate(box.of(mask), self._fit(box), mode="area") > 0).float())
            for mask, box in zip(self.masks.split(1), self.boxes, strict=True)
        ]
        return torch.cat(parts)

    def composite(self, painted: Tensor) -> Tensor:
        """The images with what was painted, [N, 3, H, W] in 0..1 on the device of `painted` [N, 3, h, w] in 0..1.

        N is a multiple of the number of images; what belongs to one image stands together.
        """
        each = len(painted) // len(self.originals)
        results = []
        for index, answers in enumerate(painted.split(each)):
            box = self.boxes[index]
            height, width = self._fit(box)
            original = self.originals[index].to(painted.device)
            results.append(original.repeat(each, 1, 1, 1))
            part = box.of(results[-1])
            answer = _resized(answers[..., :height, :width], (box.height, box.width))
            # Exact at weight 0, where the original stays.
            part.lerp_(answer, box.of(self.weights[index]).to(painted.device))
        return torch.cat(results)

    def _fit(self, box: Box) -> Pair:
        """The size that a part has on the canvas, its aspect ratio kept."""
        if not self.resizes:
            return box.height, box.width
        scale = min(self.size[0] / box.height, self.size[1] / box.width)
        return max(round(box.height * scale), 1), max(round(box.width * scale), 1)

    def _filled(self, part: Tensor) -> Tensor:
        """A part with its right and lower borders repeated to the size of the canvas."""
        missing = (0, self.size[1] - part.shape[3], 0, self.size[0] - part.shape[2])
        return F.pad(part, missing, mode="replicate")


def mask_bbox(mask: Tensor, padding: int, ratio: float) -> Box:
    """What a mask [H, W] marks and so many pixels around it, grown inside the image towards width / height `ratio`."""
    sides = []
    for marked in (mask.any(dim=1), mask.any(dim=0)):
        places = marked.nonzero()
        sides.append(
            (max(int(places[0]) - padding, 0), min(int(places[-1]) + 1 + padding, len(marked)), len(marked))
        )
    (top, bottom, _), (left, right, _) = sides
    height = max(bottom - top, round((right - left) / ratio))
    width = max(right - left, round((bottom - top) * ratio))
    (top, height), (left, width) = (
        _grown(*side, wanted) for side, wanted in zip(sides, (height, width), strict=True)
    )
    return Box(top, left, height, width)


def blurred(masks: Tensor, deviation: float) -> Tensor:
    """Masks [B, 1, H, W] blurred by a Gaussian of so many pixels; exactly 0 and 1 from thrice as far on."""
    if deviation == 0:
        return masks
    reach = math.ceil(_BLUR_REACH * deviation)
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / deviation).square())
    kernel = (kernel / kernel.sum()).view(1, 1, 1, -1)
    spread = F.conv2d(F.pad(masks, (reach, reach, 0, 0), mode="replicate"), kernel)
    return F.conv2d(F.pad(spread, (0, 0, reach, reach), mode="replicate"), kernel.mT).clamp(0, 1)


def _grown(start: int, stop: int, limit: int, wanted: int) -> Pair:
    """Where a stretch of `wanted` pixels around start..stop begins inside of 0..limit, and its length."""
    length = min(wanted, limit)
    begin = start - (length - (stop - start)) // 2
    return min(max(begin, 0), limit - length), length


def _resized(images: Tensor, size: Pair) -> Tensor:
    if images.shape[2:] == size:
        return images
    return F.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)
