"""Inpainting: repaint what a mask marks, with checkpoints that were trained for it (arXiv:2112.10752, section 4.5)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from latentgen.models.vae import Gaussian
from latentgen.pipelines.arguments import OutputType, check_output_type, check_size_conditioning
from latentgen.pipelines.autoencoding import encode_images
from latentgen.pipelines.base import DEFAULT_STEPS, AnyScheduler, Pipeline
from latentgen.pipelines.conditioning import SizeConditioning
from latentgen.pipelines.denoising import PipelineStep, completed, denoise
from latentgen.pipelines.guiding import GuidanceOptions
from latentgen.pipelines.images import ImagesInput, as_images, as_masks, for_each, padded
from latentgen.pipelines.loading import READS
from latentgen.pipelines.prompting import Prompts
from latentgen.pipelines.run import Beginning, ImageNoise, Run
from latentgen.prompt_syntax import DEFAULT_SYNTAX, PromptSyntax


@dataclass(frozen=True, eq=False)
class InpaintPipeline(Pipeline):
    """Images in which what a mask marks is painted anew, as a text says.

    The UNet is one of nine channels: it is told the mask, and the image without what lies beneath it. The stages, and
    how they are loaded, are those of :class:`Pipeline`.
    """

    reads: ClassVar[tuple[str, ...]] = READS["InpaintPipeline"]

    @property
    def diffusers_class(self) -> str:
        """The class of diffusers' pipeline over the same stages."""
        return "StableDiffusionXLInpaintPipeline" if self.is_sdxl else "StableDiffusionInpaintPipeline"

    @property
    def _image_channels(self) -> int:
        return 1 + self.decoder.config.latent_channels

    def _index(self) -> dict[str, object]:
        return super()._index() | (
            {"requires_aesthetics_score": self.is_told_a_score} if self.is_sdxl else {}
        )

    def stream(
        self,
        prompt: Prompts,
        *,
        image: ImagesInput,
        mask_image: ImagesInput,
        negative_prompt: Prompts | None = None,
        prompt_syntax: PromptSyntax = DEFAULT_SYNTAX,
        num_inference_steps: int = DEFAULT_STEPS,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float | None = None,
        guidance: GuidanceOptions | None = None,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] | None = None,
        scheduler: AnyScheduler | None = None,
        clip_skip: int = 0,
        size_conditioning: SizeConditioning | None = None,
        output_type: OutputType = "pil",
        progress: bool = True,
    ) -> Iterator[PipelineStep]:
        """Repaint images, step by step: each step can show a preview, and the last one gives the result.

        Arguments that are not listed, and the errors, are those of :meth:`TextToImagePipeline.stream`.

        Args:
            prompt: what the whole image is to show; one for all images or one for each.
            image: one image for all prompts or one for each: a path, a PIL image, an array [H, W, 3] or a tensor
                [3, H, W] of floats in 0..1. It may have any size, which the result has as well.
            mask_image: white, or 1, where the image is painted anew; of the image's size, one for all or one for each.
        """
        images = as_images("image", image)
        masks = as_masks("mask_image", mask_image, images)
        sampling = self._sampling(scheduler, num_inference_steps, timesteps, sigmas)
        request = self._request(
            prompt,
            negative_prompt,
            sampling,
            prompt_syntax=prompt_syntax,
            guidance_scale=guidance_scale,
            num_images_per_prompt=num_images_per_prompt,
            seed=seed,
            clip_skip=clip_skip,
            images=len(images),
        )
        factor, size = self.decoder.config.spatial_factor, (images.shape[2], images.shape[3])
        images, masks = padded(images, factor), padded(masks, factor)
        height, width = (side // factor for side in images.shape[2:])
        latent_masks = F.interpolate(masks, (height, width))
        shape = (len(request), self.decoder.config.latent_channels, height, width)

        def begin(noise: ImageNoise) -> Beginning:
            latents = sampling.initial(noise.draw(shape[1:]))
            posterior = encode_images(self.encoder(), images * (1 - masks), self.device)
            kept = Gaussian(*(for_each(part, len(request)) for part in posterior)).sample(
                noise.draw(shape[1:])
            )
            marked: Tensor = for_each(latent_masks, len(request)).to(self.device)
            return Beginning(latents, channels=torch.cat([marked, kept], dim=1))

        return denoise(
            self,
            Run(
                request,
                sampling,
                self._guided(request, guidance, sampling),
                shape,
                begin,
                size=size,
                output_type=check_output_type(output_type),
                progress=progress,
                size_conditioning=check_size_conditioning(size_conditioning),
            ),
        )

    __call__ = completed(stream)
