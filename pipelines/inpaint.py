"""Inpainting: repaints the masked part of an image.

Inpainting checkpoints take the mask as an input (arXiv:2112.10752, section 4.5); with others the unmasked part is
blended in at every step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from latentgen.diffusion.prediction import Denoised, Denoiser
from latentgen.diffusion.schedule import NoiseLevel
from latentgen.errors import InputError
from latentgen.pipelines.arguments import MAX_SIDE, check_integer, check_number, check_size
from latentgen.pipelines.base import Pipeline
from latentgen.pipelines.call import (
    CallOptions,
    ImageNoise,
    InitialLatents,
    LatentShape,
    PipelineCall,
    Sampling,
    read_request,
)
from latentgen.pipelines.conditioning import Prompts
from latentgen.pipelines.images import ImagesInput, as_masks, as_unit_images, encode_images, for_each, padded
from latentgen.pipelines.inpaint_crop import Canvas
from latentgen.pipelines.sampling_loop import PipelineStep, denoise, run_to_end

MAX_MASK_BLUR = 256


class MaskBlend(NamedTuple):
    """Blends the unmasked part of an image into the latents (as in arXiv:2201.09865, without its resampling).

    Attributes:
        latents: float32 [B, C, h, w], the clean latents of the image.
        noise: standard normal, of the same shape; the latents are noised with it at every level.
        repainted: bool [B, 1, h, w], true in the masked part.
    """

    latents: Tensor
    noise: Tensor
    repainted: Tensor

    def blend(self, x: Tensor, level: NoiseLevel) -> Tensor:
        """x [B, C, h, w] in the masked part, the image noised to `level` elsewhere."""
        return torch.where(self.repainted, x, level.alpha * self.latents + level.sigma * self.noise)

    def wrap(self, denoiser: Denoiser, first: NoiseLevel) -> Denoiser:
        """A denoiser whose input is blended at every level but the first, which is the start of the run.

        It equals blending x after every step: solvers work element by element, so the unmasked part of x influences the
        rest only through the network.
        """

        def denoise(x: Tensor, level: NoiseLevel) -> Tensor | Denoised:
            return denoiser(x if level == first else self.blend(x, level), level)

        return denoise


@dataclass(frozen=True, eq=False)
class InpaintPipeline(Pipeline):
    """Repaints the masked part of images with a prompt.

    A UNet with nine input channels takes the mask and the image without the masked part. A UNet with four works too:
    the unmasked part, noised to the current level, is blended into its input. Attributes and loading are those of
    :class:`Pipeline`.
    """

    @property
    def diffusers_class(self) -> str:
        return "StableDiffusionXLInpaintPipeline" if self.is_sdxl else "StableDiffusionInpaintPipeline"

    @property
    def _image_channels(self) -> int:
        latent = self.decoder.config.latent_channels
        return 0 if self.unet.config.in_channels == latent else 1 + latent

    def stream(
        self,
        prompt: Prompts,
        *,
        image: ImagesInput,
        mask_image: ImagesInput,
        strength: float = 1.0,
        mask_blur: float = 0.0,
        padding_mask_crop: int | None = None,
        height: int | None = None,
        width: int | None = None,
        **options: Unpack[CallOptions],
    ) -> Iterator[PipelineStep]:
        """Repaint images step by step: each step has a preview, the last one the result.

        Other arguments: :class:`CallOptions`. Errors: :meth:`TextToImagePipeline.stream`.

        Args:
            prompt: describes the whole image; one for all images or one for each.
            image: one image for all prompts or one for each: a path, a PIL image, an array [H, W, 3] or a tensor
                [3, H, W] of floats in 0..1. Any size; the result has the same size.
            mask_image: white, or 1, where to repaint; of the image's size, one for all or one for each. All other
                pixels of the result equal the image, to the byte (8 bits, RGB).
            strength: above 0 to 1, the fraction of the steps to take, the last ones. Below 1 the result keeps traces of
                the masked part.
            mask_blur: standard deviation in pixels of a Gaussian blur of the mask with which the result is composited
                over the image, to soften the seam. Changes pixels up to three times as far outside the mask.
            padding_mask_crop: crop to the mask plus this many pixels and enlarge the crop to `height` and `width`, for
                fine detail in small regions. None uses the whole image.
            height: height in pixels at which the model runs, a multiple of the VAE's factor; the result still has the
                image's size. By default the image's, or with `padding_mask_crop` the size the model was trained at.
            width: like `height`.
        """
        originals = as_unit_images("image", image)
        masks = as_masks("mask_image", mask_image, originals)
        request = read_request(self, prompt, images=len(originals), **options)
        sampling = request.sampling.with_strength(strength)
        if not sampling.steps:
            raise InputError("strength=0 would repaint nothing; it must be above 0")
        canvas = self._canvas(originals, masks, height, width, padding_mask_crop, mask_blur)
        factor = self.decoder.spatial_factor
        images, masks = padded(canvas.model_inputs(), factor), padded(canvas.model_masks(), factor)
        latent_masks = in_latents(masks, factor)
        latent_height, latent_width = latent_masks.shape[2:]
        shape = (len(request), self.decoder.config.latent_channels, latent_height, latent_width)
        prepare_latents = partial(self._prepare_latents, sampling, images, masks, latent_masks, shape)
        call = PipelineCall(request, sampling, shape, prepare_latents, canvas.size, canvas.composite)
        return denoise(self, call)

    __call__ = run_to_end(stream)

    def _canvas(
        self,
        originals: Tensor,
        masks: Tensor,
        height: int | None,
        width: int | None,
        padding: int | None,
        blur: float,
    ) -> Canvas:
        """The images and masks that the model runs on, from the arguments of a call."""
        for index, mask in enumerate(masks):
            if not mask.any():
                raise InputError(f"mask_image {index} is empty; paint the part to repaint white, or 1")
        factor, usual = self.decoder.spatial_factor, self.unet.config.sample_size
        size = (originals.shape[2], originals.shape[3])
        if padding is None:
            usual = (-(-size[0] // factor), -(-size[1] // factor))
        else:
            padding = check_integer("padding_mask_crop", padding, 0, MAX_SIDE)
        if (height, width, padding) != (None, None, None):
            size = check_size(height, width, usual, factor)
        blur = check_number("mask_blur", blur, 0, MAX_MASK_BLUR, "in pixels; 4 is usual")
        return Canvas.from_images(originals, masks, size=size, padding=padding, blur=blur)

    def _prepare_latents(
        self,
        sampling: Sampling,
        images: Tensor,
        masks: Tensor,
        latent_masks: Tensor,
        shape: LatentShape,
        noise: ImageNoise,
    ) -> InitialLatents:
        """Prepare latents from images [B, 3, H, W] in -1..1 and masks; noise is drawn in the order of diffusers."""
        count, encoder, takes_mask = shape[0], self.encoder(), self._image_channels > 0
        repainted = for_each(latent_masks, count).to(self.device)
        x0 = None
        if not (takes_mask and sampling.is_from_noise):
            x0 = encode_images(encoder, images, self.device, count).sample(noise.draw(shape[1:]))
        start_noise = noise.draw(shape[1:])
        if sampling.is_from_noise or x0 is None:
            latents = sampling.initial(start_noise)
        else:
            latents = sampling.noised(x0, start_noise)
        # Diffusers draws this noise even when it does not use it.
        posterior_noise = noise.draw(shape[1:])
        if x0 is not None and not takes_mask:
            return InitialLatents(latents, mask_blend=MaskBlend(x0, start_noise, repainted > 0))
        masked = encode_images(encoder, images * (1 - masks), self.device, count).sample(posterior_noise)
        return InitialLatents(latents, channels=torch.cat([repainted, masked], dim=1))


def in_latents(masks: Tensor, factor: int) -> Tensor:
    """Resize masks [B, 1, H, W] to [B, 1, h, w] by the top left pixel of each latent, as diffusers does.

    If a mask contains none of these pixels, all latents that it touches are masked.
    """
    corners, touched = masks[..., ::factor, ::factor], F.max_pool2d(masks, factor)
    return torch.where(corners.amax(dim=(2, 3), keepdim=True) > 0, corners, touched)
