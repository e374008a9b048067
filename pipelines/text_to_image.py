"""Text to image: latent diffusion conditioned on prompts (arXiv:2112.10752)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Unpack

from torch import Tensor

from latentgen.errors import InputError
from latentgen.pipelines.arguments import check_fraction, check_size, check_tensor
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
from latentgen.pipelines.load_save import PIXEL_CLASS
from latentgen.pipelines.sampling_loop import PipelineStep, denoise, run_to_end


@dataclass(frozen=True, eq=False)
class TextToImagePipeline(Pipeline):
    """Generates images from text: Stable Diffusion 1.x and 2.x, SDXL and its refiner, models distilled from them, and
    small models in pixel space.

    Attributes and loading are those of :class:`Pipeline`.
    """

    @property
    def diffusers_class(self) -> str:
        if self.is_pixel_space:
            return PIXEL_CLASS
        if not self.is_sdxl:
            distilled = self.unet.config.time_cond_proj_dim is not None
            return "LatentConsistencyModelPipeline" if distilled else "StableDiffusionPipeline"
        return (
            "StableDiffusionXLPipeline"
            if len(self.text_encoder.towers) == 2
            else "StableDiffusionXLImg2ImgPipeline"
        )

    def stream(
        self,
        prompt: Prompts,
        *,
        height: int | None = None,
        width: int | None = None,
        latents: Tensor | None = None,
        denoising_start: float = 0.0,
        denoising_end: float = 1.0,
        **options: Unpack[CallOptions],
    ) -> Iterator[PipelineStep]:
        """Generate images step by step: each step has a preview, the last one the result.

        Calling the pipeline takes the same arguments, runs to the end and returns an :class:`Output`. All arguments are
        checked before the first step. To cancel, stop iterating.

        Args:
            prompt: one prompt or several, of any length; nothing is truncated. Or precomputed embeddings,
                `Conditioning(context, pooled)`: in diffusers prompt_embeds and pooled_prompt_embeds.
            height: pixels, a multiple of the VAE's factor (8 in Stable Diffusion); by default the size the model was
                trained at.
            width: like `height`.
            latents: [B, C, h, w] to start from instead of noise from the seeds: standard normal noise, or with
                `denoising_start` the output of another pipeline.
            denoising_start: 0..1, the fraction of the schedule to start at, with the `latents` of a pipeline called
                with the same `denoising_end`: SDXL's refiner continues the base model this way.
            denoising_end: 0..1, the fraction of the schedule to stop at; use it with `output_type="latent"`.
            options: see :class:`CallOptions`.

        Raises:
            InputError: an argument is invalid; raised before anything is computed.
            NumericalError: the latents or the images have NaN or infinity; names the step.
            MemoryBudgetError: memory ran out; names the arguments that help.
        """
        request = read_request(self, prompt, **options)
        sampling = part_of_run(request.sampling, denoising_start, denoising_end, latents)
        shape = self._latent_shape(len(request), height, width, latents)
        if latents is not None:
            latents = check_tensor("latents", latents, "[B, C, h, w]", shape).float()

        def prepare_latents(noise: ImageNoise) -> InitialLatents:
            start = noise.draw(shape[1:]) if latents is None else latents.to(self.device)
            return InitialLatents(sampling.initial(start) if sampling.is_from_noise else start)

        factor = self.decoder.spatial_factor
        size = (shape[2] * factor, shape[3] * factor)
        return denoise(self, PipelineCall(request, sampling, shape, prepare_latents, size))

    __call__ = run_to_end(stream)

    def _latent_shape(
        self, count: int, height: int | None, width: int | None, latents: Tensor | None
    ) -> LatentShape:
        """[B, C, h, w] from height and width, else from the latents, else from the size of the training."""
        factor = self.decoder.spatial_factor
        size = self.unet.config.sample_size
        if isinstance(latents, Tensor) and latents.ndim == 4:
            size = (latents.shape[2], latents.shape[3])
        height, width = check_size(height, width, size, factor)
        return (count, self.decoder.config.latent_channels, height // factor, width // factor)


def part_of_run(
    sampling: Sampling, denoising_start: float, denoising_end: float, latents: Tensor | None
) -> Sampling:
    """The part of a run between two fractions of the schedule."""
    scheduler, levels, _ = sampling
    start = scheduler.steps_before(levels, check_fraction("denoising_start", denoising_start))
    stop = scheduler.steps_before(levels, check_fraction("denoising_end", denoising_end))
    if start >= stop:
        raise InputError(
            f"none of the {len(levels) - 1} steps is between denoising_start={denoising_start} and "
            f"denoising_end={denoising_end}; use more steps or a larger interval"
        )
    if start > 0 and latents is None:
        raise InputError(
            f"denoising_start={denoising_start} needs latents to start from: the output of a pipeline with the "
            'same denoising_end and output_type="latent"'
        )
    return sampling._replace(steps=range(start, stop))
