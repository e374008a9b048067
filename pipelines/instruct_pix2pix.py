"""InstructPix2Pix: edits images by instruction (arXiv:2211.09800)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from latentgen.diffusion.guidance import ClassifierFree, TextAndImage, is_guided
from latentgen.pipelines.arguments import AnyScheduler, OutputType, check_guidance_scale
from latentgen.pipelines.base import DEFAULT_STEPS, Pipeline
from latentgen.pipelines.call import ImageNoise, InitialLatents, choose_sampling, make_call, read_request
from latentgen.pipelines.conditioning import Prompts
from latentgen.pipelines.guidance_options import GuidanceCall
from latentgen.pipelines.images import ImagesInput, as_images, for_each
from latentgen.pipelines.load_save import classes_read_by
from latentgen.pipelines.sampling_loop import PipelineStep, denoise, run_to_end
from latentgen.pipelines.vae_ops import encode_images
from latentgen.prompt_syntax import DEFAULT_SYNTAX, PromptSyntax

DEFAULT_IMAGE_GUIDANCE = 1.5


@dataclass(frozen=True, eq=False)
class InstructPix2PixPipeline(Pipeline):
    """Edits images by instruction.

    The UNet has eight input channels: the noisy latents and the latents of the image. Attributes and loading are those
    of :class:`Pipeline`.
    """

    supported_classes: ClassVar[tuple[str, ...]] = classes_read_by("InstructPix2PixPipeline")

    @property
    def diffusers_class(self) -> str:
        """The name of the diffusers pipeline with the same models."""
        return "StableDiffusionInstructPix2PixPipeline"

    @property
    def _image_channels(self) -> int:
        return self.decoder.config.latent_channels

    def stream(
        self,
        prompt: Prompts,
        *,
        image: ImagesInput,
        negative_prompt: Prompts | None = None,
        prompt_syntax: PromptSyntax = DEFAULT_SYNTAX,
        num_inference_steps: int = DEFAULT_STEPS,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float | None = None,
        image_guidance_scale: float = DEFAULT_IMAGE_GUIDANCE,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] | None = None,
        scheduler: AnyScheduler | None = None,
        output_type: OutputType = "pil",
        progress: bool = True,
    ) -> Iterator[PipelineStep]:
        """Edit images step by step: each step has a preview, the last one the result.

        Other arguments and the errors are those of :meth:`TextToImagePipeline.stream`.

        Args:
            prompt: the instruction, such as "make it snowy"; one for all images or one for each.
            image: one image for all prompts or one for each: a path, a PIL image, an array [H, W, 3] or a tensor
                [3, H, W] of floats in 0..1. Any size; the result has the same.
            guidance_scale: how closely to follow the instruction; 1 or less turns all guidance off.
            image_guidance_scale: how closely to follow the image; less than 1 turns all guidance off.
        """
        images = as_images("image", image)
        sampling = choose_sampling(self, scheduler, num_inference_steps, timesteps, sigmas)
        request = read_request(
            self,
            prompt,
            negative_prompt,
            sampling,
            prompt_syntax=prompt_syntax,
            guidance_scale=guidance_scale,
            num_images_per_prompt=num_images_per_prompt,
            seed=seed,
            images=len(images),
        )
        image_scale = check_guidance_scale(
            image_guidance_scale, name="image_guidance_scale", usual=DEFAULT_IMAGE_GUIDANCE
        )
        has_guidance = is_guided(request.guidance_scale) and image_scale >= 1
        guided = GuidanceCall(ClassifierFree(1.0), ())
        if has_guidance:
            guided = GuidanceCall(TextAndImage(request.guidance_scale, image_scale), request.negatives * 2)
        size = (images.shape[2], images.shape[3])
        images, shape = self._padded_to_latents(images, len(request))

        def prepare_latents(noise: ImageNoise) -> InitialLatents:
            # The UNet was trained on the mode of the posterior, without the scaling factor.
            mode = (
                encode_images(self.encoder(), images, self.device).mean / self.decoder.config.scaling_factor
            )
            cond = for_each(mode, len(request))
            channels = torch.cat([torch.zeros_like(cond), cond, cond]) if has_guidance else cond
            return InitialLatents(sampling.initial(noise.draw(shape[1:])), channels)

        call = make_call(
            self,
            request,
            sampling,
            shape,
            prepare_latents,
            guidance=guided,
            size=size,
            output_type=output_type,
            progress=progress,
        )
        return denoise(self, call)

    __call__ = run_to_end(stream)
