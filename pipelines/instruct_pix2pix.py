"""InstructPix2Pix: edits images by instruction (arXiv:2211.09800)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Unpack

import torch

from latentgen.diffusion.guidance import ClassifierFree, TextAndImage, is_guided
from latentgen.pipelines.arguments import check_guidance_scale
from latentgen.pipelines.base import Pipeline
from latentgen.pipelines.call import ImageNoise, InitialLatents, PipelineCall, UnguidedOptions, read_request
from latentgen.pipelines.conditioning import Prompts
from latentgen.pipelines.images import ImagesInput, as_images, encode_images
from latentgen.pipelines.sampling_loop import PipelineStep, denoise, run_to_end

DEFAULT_IMAGE_GUIDANCE = 1.5


@dataclass(frozen=True, eq=False)
class InstructPix2PixPipeline(Pipeline):
    """Edits images by instruction.

    The UNet has eight input channels: the noisy latents and the latents of the image. Attributes and loading are those
    of :class:`Pipeline`.
    """

    @property
    def diffusers_class(self) -> str:
        return "StableDiffusionInstructPix2PixPipeline"

    @property
    def _image_channels(self) -> int:
        return self.decoder.config.latent_channels

    def stream(
        self,
        prompt: Prompts,
        *,
        image: ImagesInput,
        image_guidance_scale: float = DEFAULT_IMAGE_GUIDANCE,
        **options: Unpack[UnguidedOptions],
    ) -> Iterator[PipelineStep]:
        """Edit images step by step: each step has a preview, the last one the result.

        Other arguments: :class:`UnguidedOptions`. Errors: :meth:`TextToImagePipeline.stream`.

        Args:
            prompt: the instruction, such as "make it snowy"; one for all images or one for each.
            image: one image for all prompts or one for each: a path, a PIL image, an array [H, W, 3] or a tensor
                [3, H, W] of floats in 0..1. Any size; the result has the same size.
            guidance_scale: how closely to follow the instruction; 1 or less turns all guidance off.
            image_guidance_scale: how closely to follow the image; less than 1 turns all guidance off.
        """
        images = as_images("image", image)
        request = read_request(self, prompt, images=len(images), guidance=None, **options)
        image_scale = check_guidance_scale(
            image_guidance_scale, name="image_guidance_scale", usual=DEFAULT_IMAGE_GUIDANCE
        )
        has_guidance = is_guided(request.guidance_scale) and image_scale >= 1
        guidance = TextAndImage(request.guidance_scale, image_scale) if has_guidance else ClassifierFree(1.0)
        negatives = request.negatives * 2 if has_guidance else ()
        request = replace(request, guidance=guidance, negatives=negatives)
        padded, shape = self._padded_to_latents(images, len(request))

        def prepare_latents(noise: ImageNoise) -> InitialLatents:
            # The UNet was trained on the mode of the posterior, without the scaling factor.
            mode = encode_images(self.encoder(), padded, self.device, len(request)).mean
            cond = mode / self.decoder.config.scaling_factor
            channels = torch.cat([torch.zeros_like(cond), cond, cond]) if has_guidance else cond
            return InitialLatents(request.sampling.initial(noise.draw(shape[1:])), channels)

        size = (images.shape[2], images.shape[3])
        return denoise(self, PipelineCall(request, request.sampling, shape, prepare_latents, size))

    __call__ = run_to_end(stream)
