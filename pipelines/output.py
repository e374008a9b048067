"""What a call gives."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from latentgen.image import numpy_to_pil, unit_to_numpy
from latentgen.pipelines.arguments import OutputType

Images = list[Image.Image] | np.ndarray | Tensor


class Output(NamedTuple):
    """What a call gives.

    Attributes:
        images: what `output_type` asked for: "pil" a list of images, "np" float32 [B, H, W, 3] in 0..1, "pt"
            float32 [B, 3, H, W] in 0..1 on the device, "latent" float32 [B, C, h, w] on the device. Prompts
            come in their order, the images of one prompt together.
        seeds: the seed of each image, which alone makes that image again.
    """

    images: Images
    seeds: tuple[int, ...]


def export(images: Tensor, output_type: OutputType) -> Images:
    """Turn images [B, 3, H, W] in 0..1 into what `output_type` names."""
    match output_type:
        case "pil":
            return numpy_to_pil(unit_to_numpy(images))
        case "np":
            return unit_to_numpy(images)
        case "pt" | "latent":
            return images
