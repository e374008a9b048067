"""Upscaling by diffusion conditioned on the low-resolution image (arXiv:2112.10752, section 4.4)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from latentgen.checkpoints.cascade import open_cascade
from latentgen.checkpoints.folder import EMBEDDED_DEFAULT, CheckpointFolder
from latentgen.checkpoints.single_file import Checkpoint
from latentgen.diffusion.scheduler import Scheduler
from latentgen.errors import ConfigError
from latentgen.files import quote
from latentgen.memory import SMALLEST_TILE
from latentgen.models.config import VAEConfig
from latentgen.models.pixels import PixelConfig, PixelDecoder
from latentgen.models.unet_config import UNetConfig
from latentgen.pipelines import load_save
from latentgen.pipelines.arguments import MAX_SIDE, check_integer
from latentgen.pipelines.base import Pipeline
from latentgen.pipelines.call import CallOptions, ImageNoise, InitialLatents, PipelineCall, read_request
from latentgen.pipelines.conditioning import Prompts
from latentgen.pipelines.images import ImagesInput, as_images, for_each, padded
from latentgen.pipelines.sampling_loop import PipelineStep, denoise, run_to_end
from latentgen.pipelines.vae_ops import to_unit

DEFAULT_NOISE_LEVEL = 20
MAX_NOISE_LEVEL = 350
MAX_ENLARGEMENT = 16
# In model_index.json; diffusers ignores keys that begin with an underscore.
_ENLARGEMENT_KEY = "_enlargement"
# Side of the tiles of larger images, in pixels of the input.
DEFAULT_TILE = 256


def low_res_ratio(unet: UNetConfig, vae: VAEConfig | PixelConfig) -> int:
    """The ratio of the low-resolution image's side to the latents' side, from the UNet's in_channels.

    An image larger than the latents is reshaped by space-to-depth (arXiv:1609.05158): ratio x ratio pixels become
    channels, so the UNet takes the channels of the latents plus ratio**2 times those of an image.
    """
    return max(1, math.isqrt(max(0, unet.in_channels - vae.latent_channels) // vae.out_channels))


def as_channels(images: Tensor, ratio: int, enlargement: int) -> Tensor:
    """Low-resolution images [B, 3, h, w] as the UNet's image channels, at the resolution of the latents.

    They become [B, 3 * ratio**2, h / ratio, w / ratio] by space-to-depth, or in pixel space, where ratio is 1,
    [B, 3, h * enlargement, w * enlargement] by bicubic interpolation (arXiv:2104.07636, section 2.2).
    """
    if enlargement > 1:
        images = F.interpolate(images, scale_factor=enlargement, mode="bicubic")
    return F.pixel_unshuffle(images, ratio)


@dataclass(frozen=True, eq=False)
class UpscalePipeline(Pipeline):
    """Upscales images by `scale`, 4 for the published checkpoints.

    The UNet takes the image, noised to a level that it receives as a class label (noise conditioning augmentation,
    arXiv:2106.15282): the more noise, the more detail is invented. Latents are as large as the image or smaller; see
    :func:`low_res_ratio`. In pixel space the UNet has 6 input channels and takes the enlarged image. Attributes and
    loading are those of :class:`Pipeline`.

    Attributes:
        low_res_scheduler: its noise schedule noises the image.
        max_noise_level: the highest noise level of the training.
        enlargement: in pixel space, the factor that the image is enlarged by for the UNet, equal to `scale`; 1 with a
            VAE.

    Raises:
        ConfigError: the models do not match, or a value is out of range.
    """

    _takes_noise_level = True

    low_res_scheduler: Scheduler = field(default_factory=Scheduler)
    max_noise_level: int = MAX_NOISE_LEVEL
    enlargement: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        unet, factor = self.unet.config, self.decoder.spatial_factor
        if factor % self._ratio:
            raise ConfigError(
                f"in_channels {unet.in_channels} of the UNet means images {self._ratio} times the latents' side, "
                f"which must divide {factor}, the factor of the VAE"
            )
        if unet.class_embed_type not in (None, "timestep"):
            raise ConfigError(
                f"class_embed_type is {quote(unet.class_embed_type)}; an upscaler's UNet takes the noise level, a "
                "number, so it must be null (with num_class_embeds) or 'timestep'"
            )
        known = self.low_res_scheduler.schedule.num_train_timesteps
        labels = known if unet.class_embed_type else unet.num_class_embeds or known
        most = min(known, labels) - 1
        if type(self.max_noise_level) is not int or not 0 <= self.max_noise_level <= most:
            raise ConfigError(
                f"max_noise_level is {quote(self.max_noise_level)}; it must be a whole number from 0 to {most}, the "
                "limit of the UNet's class labels and the low_res_scheduler"
            )
        most = MAX_ENLARGEMENT if isinstance(self.decoder, PixelDecoder) else 1
        if type(self.enlargement) is not int or not 1 <= self.enlargement <= most:
            raise ConfigError(
                f"enlargement is {quote(self.enlargement)}; it must be a whole number from 1 to "
                f"{MAX_ENLARGEMENT} in pixel space, and 1 with a VAE"
            )

    @classmethod
    def _embedded(cls) -> CheckpointFolder:
        return open_cascade(EMBEDDED_DEFAULT)[-1][1]

    @classmethod
    def _own_fields(cls, checkpoint: Checkpoint) -> dict[str, Any]:
        return {
            "low_res_scheduler": Scheduler.from_config(checkpoint.config("low_res_scheduler")),
            "max_noise_level": checkpoint.model_index.get("max_noise_level", MAX_NOISE_LEVEL),
            "enlargement": checkpoint.model_index.get(_ENLARGEMENT_KEY, 1),
        }

    @property
    def scale(self) -> int:
        """The factor between the sides of the input and the result."""
        return self.enlargement * self.decoder.spatial_factor // self._ratio

    @property
    def diffusers_class(self) -> str:
        return load_save.PIXEL_UPSCALE_CLASS if self.is_pixel_space else "StableDiffusionUpscalePipeline"

    @property
    def schedulers(self) -> dict[str, Scheduler]:
        """Schedulers by their component name in the diffusers layout."""
        return {**super().schedulers, "low_res_scheduler": self.low_res_scheduler}

    @property
    def _image_channels(self) -> int:
        return self.decoder.config.out_channels * self._ratio**2

    @property
    def _ratio(self) -> int:
        return low_res_ratio(self.unet.config, self.decoder.config)

    def _index(self) -> dict[str, object]:
        level: dict[str, object] = {"max_noise_level": self.max_noise_level}
        if self.is_pixel_space:
            return level | {_ENLARGEMENT_KEY: self.enlargement}
        # Unlike diffusers' other pipelines, this one has no requires_safety_checker.
        index = {key: value for key, value in super()._index().items() if key != "requires_safety_checker"}
        return index | {"watermarker": load_save.ABSENT} | level

    def stream(
        self,
        prompt: Prompts = "",
        *,
        image: ImagesInput,
        noise_level: int = DEFAULT_NOISE_LEVEL,
        tile: int | None = DEFAULT_TILE,
        match_input: bool = False,
        **options: Unpack[CallOptions],
    ) -> Iterator[PipelineStep]:
        """Upscale images step by step: each step has a preview, the last one the result.

        Other arguments: :class:`CallOptions`. Errors: :meth:`TextToImagePipeline.stream`.

        Args:
            prompt: describes the image; one for all images or one for each.
            image: one image for all prompts or one for each: a path, a PIL image, an array [H, W, 3] or a tensor
                [3, H, W] of floats in 0..1, of any size.
            noise_level: timestep to noise the image to, 0..max_noise_level: higher values invent more detail and are
                less faithful.
            tile: side, in input pixels, of the overlapping tiles that a larger image is processed in; memory then
                grows only with the result. Each step blends the tiles (arXiv:2302.08113), so there are no seams. None
                processes each image at once.
            match_input: correct the result so that it equals the input when downscaled: more faithful in color and
                position, but flaws of the input remain.
        """
        images = as_images("image", image)
        request = read_request(self, prompt, images=len(images), **options)
        if tile is not None:
            tile = check_integer("tile", tile, SMALLEST_TILE * self._ratio, MAX_SIDE)
            tile = tile * self.enlargement // self._ratio
        noise_level = check_integer("noise_level", noise_level, 0, self.max_noise_level)
        whole = padded(images, self._ratio)
        height, width = (side * self.enlargement // self._ratio for side in whole.shape[2:])
        shape = (len(request), self.decoder.config.latent_channels, height, width)

        def prepare_latents(noise: ImageNoise) -> InitialLatents:
            level = self.low_res_scheduler.schedule.level(noise_level)
            low_res = for_each(whole, len(request)).to(self.device)
            # Draw this noise before that of the latents, as diffusers does.
            noised = level.alpha * low_res + level.sigma * noise.draw(low_res.shape[1:])
            label = torch.tensor([noise_level], device=self.device)
            channels = as_channels(noised, self._ratio, self.enlargement)
            return InitialLatents(request.sampling.initial(noise.draw(shape[1:])), channels, label)

        size = (images.shape[2] * self.scale, images.shape[3] * self.scale)
        composite = partial(back_projected, small=to_unit(images)) if match_input else None
        call = PipelineCall(
            request, request.sampling, shape, prepare_latents, size, composite=composite, tile=tile
        )
        return denoise(self, call)

    __call__ = run_to_end(stream)


def back_projected(images: Tensor, small: Tensor) -> Tensor:
    """Correct images [B, 3, H, W] in 0..1 so that, downscaled by averaging, they are close to `small`.

    One step of iterative back-projection (Irani and Peleg, 1991): the difference is enlarged and added. `small` is
    [b, 3, h, w] in 0..1; each of its images belongs to B / b adjacent images.
    """
    small = for_each(small, len(images)).to(images.device)
    missing = small - F.interpolate(images, small.shape[2:], mode="area")
    return (images + F.interpolate(missing, images.shape[2:], mode="bicubic")).clamp(0, 1)
