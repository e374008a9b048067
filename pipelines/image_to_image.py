"""Image to image: noises an image part of the way and denoises it with a prompt (SDEdit, arXiv:2108.01073)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from latentgen.pipelines.arguments import AnyScheduler, OutputType
from latentgen.pipelines.base import DEFAULT_STEPS, Pipeline
from latentgen.pipelines.call import ImageNoise, InitialLatents, choose_sampling, make_call, read_request
from latentgen.pipelines.conditioning import Prompts, SizeConditioning
from latentgen.pipelines.guidance_options import GuidanceOptions
from latentgen.pipelines.images import ImagesInput, as_images
from latentgen.pipelines.load_save import classes_read_by
from latentgen.pipelines.sampling_loop import PipelineStep, denoise, run_to_end
from latentgen.pipelines.vae_ops import encode_for_each
from latentgen.prompt_syntax import DEFAULT_SYNTAX, PromptSyntax

DEFAULT_STRENGTH = 0.8


@dataclass(frozen=True, eq=False)
class ImageToImagePipeline(Pipeline):
    """Generates images from other images and a prompt, with any checkpoint for text to image.

    Attributes and loading are those of :class:`Pipeline`; `ImageToImagePipeline.from_pipeline(text_to_image)` shares
    the models of a loaded pipeline.
    """

    supported_classes: ClassVar[tuple[str, ...]] = classes_read_by("ImageToImagePipeline")

    @property
    def diffusers_class(self) -> str:
        """The name of the diffusers pipeline with the same models."""
        return "StableDiffusionXLImg2ImgPipeline" if self.is_sdxl else "StableDiffusionImg2ImgPipeline"

    @property
    def _image_channels(self) -> int:
        return 0

    def stream(
        self,
        prompt: Prompts,
        *,
        image: ImagesInput,
        strength: float = DEFAULT_STRENGTH,
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
        """Regenerate images step by step: each step has a preview, the last one the result.

        Other arguments and the errors are those of :meth:`TextToImagePipeline.stream`.

        Args:
            prompt: one for all images or one for each.
            image: one image for all prompts or one for each: a path, a PIL image, an array [H, W, 3] or a tensor
                [3, H, W] of floats in 0..1. Any size; the result has the same.
            strength: 0..1, the fraction of the steps to take, the last ones. 1.0 ignores the input image, like text to
                image; 0.0 returns it unchanged but for the VAE's encoding and decoding, in a single PipelineStep.
            num_inference_steps: steps of the whole run, before `strength`.
        """
        images = as_images("image", image)
        sampling = choose_sampling(self, scheduler, num_inference_steps, timesteps, sigmas).with_strength(
            strength
        )
        request = read_request(
            self,
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
        size = (images.shape[2], images.shape[3])
        images, shape = self._padded_to_latents(images, len(request))

        def prepare_latents(noise: ImageNoise) -> InitialLatents:
            if sampling.is_from_noise:
                return InitialLatents(sampling.initial(noise.draw(shape[1:])))
            posterior = encode_for_each(self.encoder(), images, self.device, len(request))
            if not sampling.steps:
                return InitialLatents(posterior.mean)
            # Sample the posterior before the noise, the order of diffusers.
            x0 = posterior.sample(noise.draw(shape[1:]))
            return InitialLatents(sampling.noised(x0, noise.draw(shape[1:])))

        call = make_call(
            self,
            request,
            sampling,
            shape,
            prepare_latents,
            guidance=guidance,
            size=size,
            output_type=output_type,
            progress=progress,
            size_conditioning=size_conditioning,
        )
        return denoise(self, call)

    __call__ = run_to_end(stream)
