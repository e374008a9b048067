"""Image to image: noises an image part of the way and denoises it with a prompt (SDEdit, arXiv:2108.01073)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Unpack

from latentgen.pipelines.base import Pipeline
from latentgen.pipelines.call import CallOptions, ImageNoise, InitialLatents, PipelineCall, read_request
from latentgen.pipelines.conditioning import Prompts
from latentgen.pipelines.images import ImagesInput, as_images, encode_images
from latentgen.pipelines.sampling_loop import PipelineStep, denoise, run_to_end

DEFAULT_STRENGTH = 0.8


@dataclass(frozen=True, eq=False)
class ImageToImagePipeline(Pipeline):
    """Generates images from other images and a prompt, with any checkpoint for text to image.

    Attributes and loading are those of :class:`Pipeline`; `ImageToImagePipeline.from_pipeline(text_to_image)` shares
    the models of a loaded pipeline.
    """

    @property
    def diffusers_class(self) -> str:
        return "StableDiffusionXLImg2ImgPipeline" if self.is_sdxl else "StableDiffusionImg2ImgPipeline"

    def stream(
        self,
        prompt: Prompts,
        *,
        image: ImagesInput,
        strength: float = DEFAULT_STRENGTH,
        **options: Unpack[CallOptions],
    ) -> Iterator[PipelineStep]:
        """Regenerate images step by step: each step has a preview, the last one the result.

        Other arguments: :class:`CallOptions`. Errors: :meth:`TextToImagePipeline.stream`.

        Args:
            prompt: one for all images or one for each.
            image: one image for all prompts or one for each: a path, a PIL image, an array [H, W, 3] or a tensor
                [3, H, W] of floats in 0..1. Any size; the result has the same size.
            strength: 0..1, the fraction of the steps to take, the last ones. 1.0 ignores the input image, like text to
                image; 0.0 returns it unchanged but for the VAE's encoding and decoding, in a single PipelineStep.
            num_inference_steps: steps of the whole run, before `strength`.
        """
        images = as_images("image", image)
        request = read_request(self, prompt, images=len(images), **options)
        sampling = request.sampling.with_strength(strength)
        padded, shape = self._padded_to_latents(images, len(request))

        def prepare_latents(noise: ImageNoise) -> InitialLatents:
            if sampling.is_from_noise:
                return InitialLatents(sampling.initial(noise.draw(shape[1:])))
            posterior = encode_images(self.encoder(), padded, self.device, len(request))
            if not sampling.steps:
                return InitialLatents(posterior.mean)
            # Sample the posterior before drawing the noise, as diffusers does.
            x0 = posterior.sample(noise.draw(shape[1:]))
            return InitialLatents(sampling.noised(x0, noise.draw(shape[1:])))

        size = (images.shape[2], images.shape[3])
        return denoise(self, PipelineCall(request, sampling, shape, prepare_latents, size))

    __call__ = run_to_end(stream)
