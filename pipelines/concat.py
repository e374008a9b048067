"""Image to image with an image concatenated to the noisy latents (Palette, arXiv:2111.05826)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Unpack

from latentgen.pipelines.base import Pipeline
from latentgen.pipelines.call import CallOptions, ImageNoise, InitialLatents, PipelineCall, read_request
from latentgen.pipelines.conditioning import Prompts
from latentgen.pipelines.images import ImagesInput, as_images, encode_images
from latentgen.pipelines.load_save import PIXEL_CONCAT_CLASS
from latentgen.pipelines.sampling_loop import PipelineStep, denoise, run_to_end


@dataclass(frozen=True, eq=False)
class ConcatImagePipeline(Pipeline):
    """Translates images as learned from pairs of images, for example to colorize or to complete them.

    The UNet takes twice the channels of the latents. The second half is the image: the mean of its latents without the
    scaling factor, as in InstructPix2Pix, so that diffusers' pipeline of that name can load the checkpoints. But
    its guidance has two branches, both with the image, and the prompt is optional. Attributes and loading are those
    of :class:`Pipeline`.
    """

    @property
    def diffusers_class(self) -> str:
        # diffusers' pipeline computes the same at image_guidance_scale=1.
        return PIXEL_CONCAT_CLASS if self.is_pixel_space else "StableDiffusionInstructPix2PixPipeline"

    @property
    def _image_channels(self) -> int:
        return self.decoder.config.latent_channels

    def stream(
        self, prompt: Prompts = "", *, image: ImagesInput, **options: Unpack[CallOptions]
    ) -> Iterator[PipelineStep]:
        """Translate images step by step: each step has a preview, the last one the result.

        Other arguments: :class:`CallOptions`. Errors: :meth:`TextToImagePipeline.stream`.

        Args:
            prompt: for models trained with text; one for all images or one for each.
            image: the input; one image for all prompts or one for each: a path, a PIL image, an array [H, W, 3] or a
                tensor [3, H, W] of floats in 0..1. Any size; the result has the same size.
            guidance_scale: scale of classifier-free guidance; use 1 or less for models without text, in half the time.
        """
        images = as_images("image", image)
        request = read_request(self, prompt, images=len(images), **options)
        padded, shape = self._padded_to_latents(images, len(request))

        def prepare_latents(noise: ImageNoise) -> InitialLatents:
            mean = encode_images(self.encoder(), padded, self.device, len(request)).mean
            latents = request.sampling.initial(noise.draw(shape[1:]))
            return InitialLatents(latents, mean / self.decoder.config.scaling_factor)

        size = (images.shape[2], images.shape[3])
        return denoise(self, PipelineCall(request, request.sampling, shape, prepare_latents, size))

    __call__ = run_to_end(stream)
