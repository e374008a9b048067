"""An autoencoder's encoder as training uses it: a few images at a time, to what is kept of their latents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from latentgen.errors import DatasetError
from latentgen.models.pixels import ImageEncoder
from latentgen.train.data import Captions, Sample, to_tensor

# How many images are encoded at once: an autoencoder needs some GB for each megapixel, beside a model that is loaded.
ENCODING_BATCH = 32
ENCODING_PIXELS = 2**18


class ViewFacts(NamedTuple):
    """What is known of a view beside its latents.

    Attributes:
        captions: what it may be called.
        size: its height and width.
        original_size: height and width of the whole image.
        crop_corner: top and left of the crop.
        mask: where the loss counts, at the resolution of the latents: uint8 [1, h, w], None for everywhere.
    """

    captions: Captions
    size: tuple[int, int]
    original_size: tuple[int, int]
    crop_corner: tuple[int, int]
    mask: Tensor | None


class ViewEncoder:
    """An autoencoder's encoder on its device."""

    def __init__(self, encoder: ImageEncoder, device: torch.device) -> None:
        self.device = device
        self._encoder = encoder
        self._factor = encoder.config.spatial_factor

    def facts(self, view: Sample) -> ViewFacts:
        """What is known of a view, its mask scaled down to the latents."""
        size = (view.image.height, view.image.width)
        mask = None
        if view.mask is not None:
            small = (size[1] // self._factor, size[0] // self._factor)
            mask = torch.from_numpy(np.array(view.mask.resize(small, Image.Resampling.BOX)))[None]
        return ViewFacts(view.captions, size, view.original_size or size, view.crop_corner, mask)

    @torch.no_grad()
    def encode(self, images: Sequence[Image.Image]) -> list[Tensor]:
        """Mean and standard deviation of the latents of images of one size: float16 [2, C, h, w] each, on the CPU."""
        most = batch_limit(images[0].size)
        rows: list[Tensor] = []
        for start in range(0, len(images), most):
            pixels = to_tensor(images[start : start + most]).to(self.device)
            with torch.autocast(
                self.device.type, enabled=False
            ):  # a half precision may overflow in an encoder
                posterior = self._encoder(pixels)
            both = torch.stack([posterior.mean, (0.5 * posterior.logvar).exp()], dim=1)
            # The convolutions would hand on the encoder's channels_last.
            rows += both.half().cpu().contiguous().unbind()
        return rows


class EncodingQueue:
    """Images that wait until there are enough of one size for a batch.

    Batches of one size of image all have one shape, filled up if need be: kernels may add up in another order for
    another shape, and the latents of an image would depend on how many others were missing from the cache.
    """

    def __init__(self, encoder: ViewEncoder) -> None:
        self._encoder = encoder
        self._waiting: dict[tuple[int, int], list[tuple[Image.Image, Callable[[Tensor], None]]]] = {}

    def add(self, image: Image.Image, keep: Callable[[Tensor], None]) -> None:
        """Hand the latents of `image` to `keep`, sooner or later."""
        waiting = self._waiting.setdefault(image.size, [])
        waiting.append((image, keep))
        if len(waiting) == batch_limit(image.size):
            self._encode(image.size)

    def finish(self) -> None:
        """Encode what still waits."""
        for size in list(self._waiting):
            self._encode(size)

    def _encode(self, size: tuple[int, int]) -> None:
        waiting = self._waiting.pop(size)
        images = [image for image, _ in waiting]
        filled = images + images[-1:] * (batch_limit(size) - len(images))
        for row, (_, keep) in zip(self._encoder.encode(filled), waiting, strict=False):
            keep(row)


def batch_limit(size: tuple[int, int]) -> int:
    """How many images of a size are encoded at once."""
    return max(1, min(ENCODING_BATCH, ENCODING_PIXELS // (size[0] * size[1])))


def pixels_of(image: Image.Image) -> Tensor:
    """An RGB image as uint8 [3, H, W]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def image_before(view: Sample) -> Image.Image:
    """The image that a view is an edit of.

    Raises:
        DatasetError: it is none.
    """
    if view.before is None:
        raise DatasetError("an image has no image that it is an edit of, which this task shows to the UNet")
    return view.before
