"""Text to image: latent diffusion conditioned on prompts (arXiv:2112.10752)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from latentgen.errors import InputError
from latentgen.pipelines.arguments import (
    AnyScheduler,
    OutputType,
    check_fraction,
    check_latents,
    check_size,
)
from latentgen.pipelines.base import DEFAULT_STEPS, Pipeline
from latentgen.pipelines.call import (
    ImageNoise,
    InitialLatents,
    Sampling,
    choose_sampling,
    make_call,
    read_request,
)
from latentgen.pipelines.conditioning import Prompts, SizeConditioning
from latentgen.pipelines.guidance_options import GuidanceOptions
from latentgen.pipelines.load_save import PIXEL_CLASS, classes_read_by
from latentgen.pipelines.sampling_loop import PipelineStep, denoise, run_to_end
from latentgen.prompt_syntax import DEFAULT_SYNTAX, PromptSyntax


@dataclass(frozen=True, eq=False)
class TextToImagePipeline(Pipeline):
    """Generates images from text: Stable Diffusion 1.x and 2.x, SDXL and its refiner, models distilled from them, and
    small models in pixel space.

    Attributes and loading are those of :class:`Pipeline`.
    """

    supported_classes: ClassVar[tuple[str, ...]] = classes_read_by("TextToImagePipeline")

    @property
    def diffusers_class(self) -> str:
        """The name of the diffusers pipeline with the same models; in pixel space one of our own."""
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

    @property
    def _image_channels(self) -> int:
        return 0

    def stream(
        self,
        prompt: Prompts,
        *,
        negative_prompt: Prompts | None = None,
        prompt_syntax: PromptSyntax = DEFAULT_SYNTAX,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = DEFAULT_STEPS,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float | None = None,
        guidance: GuidanceOptions | None = None,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] | None = None,
        scheduler: AnyScheduler | None = None,
        latents: Tensor | None = None,
        denoising_start: float = 0.0,
        denoising_end: float = 1.0,
        clip_skip: int = 0,
        size_conditioning: SizeConditioning | None = None,
        output_type: OutputType = "pil",
        progress: bool = True,
    ) -> Iterator[PipelineStep]:
        """Generate images step by step: each step has a preview, the last one the result.

        Calling the pipeline takes the same arguments, runs to the end and returns an :class:`Output`. All arguments are
        checked before the first step. To cancel, stop iterating.

        Args:
            prompt: one prompt or several, of any length; nothing is truncated. Or precomputed embeddings,
                `Conditioning(context, pooled)`: in diffusers prompt_embeds and pooled_prompt_embeds.
            negative_prompt: one for all prompts or one for each, or embeddings; None is the empty prompt.
            prompt_syntax: "explicit" reads `(text:1.2)` as a weight, and `\\(` as a parenthesis; the rest is text.
                "a1111" also reads `(text)` as 1.1, `[text]` as 1 / 1.1, `BREAK`, `[from:to:when]`, `[to:when]`,
                `[from::when]` and `[one|other]`; `when` is a number of steps, or with a decimal point a fraction of
                them. In "plain" every character is text.
            height: pixels, a multiple of the VAE's factor (8 in Stable Diffusion); by default the size the model was
                trained at.
            width: like `height`.
            num_inference_steps: steps of the solver, over the whole schedule.
            timesteps: decreasing, one for each step; replaces `num_inference_steps` and the scheduler's spacing.
            sigmas: decreasing noise levels sigma / alpha, one for each step and one where the run ends, mostly 0;
                replaces `num_inference_steps`. For flow-matching models sigma before the shift; the end may be omitted.
            guidance_scale: scale of classifier-free guidance (arXiv:2207.12598, eq. 6, as 1 + w); 1 or less
                is no guidance, in half the time. By default the checkpoint's own (the embedded model has one), else
                7.5, or 5 for SDXL, as in diffusers.
            guidance: further options: rescaling, an interval, a perpendicular negative prompt, CFG++.
            num_images_per_prompt: images per prompt.
            seed: image i of the call gets seed + i; or one seed for each image; None draws one at random.
            scheduler: the name of a solver, a Scheduler or a diffusers scheduler; by default the checkpoint's.
            latents: [B, C, h, w] to start from instead of noise from the seeds: standard normal noise, or with
                `denoising_start` the output of another pipeline.
            denoising_start: 0..1, the fraction of the schedule to start at, with the `latents` of a pipeline called
                with the same `denoising_end`: SDXL's refiner continues the base model this way.
            denoising_end: 0..1, the fraction of the schedule to stop at; use it with `output_type="latent"`.
            clip_skip: how many of the text encoder's last layers to skip for the prompts.
            size_conditioning: SDXL's size and crop conditioning.
            output_type: "pil", "np", "pt" or "latent"; see Output.
            progress: show a progress bar.

        Raises:
            InputError: an argument is invalid; raised before anything is computed.
            NumericalError: the latents or the images have NaN or infinity; names the step.
            MemoryBudgetError: memory ran out; names the arguments that help.
        """
        sampling = part_of_run(
            choose_sampling(self, scheduler, num_inference_steps, timesteps, sigmas),
            denoising_start,
            denoising_end,
            latents,
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
        )
        shape = self._latent_shape(len(request), height, width, latents)
        user_latents = None if latents is None else check_latents(latents, shape)

        def prepare_latents(noise: ImageNoise) -> InitialLatents:
            start = noise.draw(shape[1:]) if user_latents is None else user_latents.to(self.device)
            return InitialLatents(sampling.initial(start) if sampling.steps.start == 0 else start)

        factor = self.decoder.config.spatial_factor
        call = make_call(
            self,
            request,
            sampling,
            shape,
            prepare_latents,
            guidance=guidance,
            size=(shape[2] * factor, shape[3] * factor),
            output_type=output_type,
            progress=progress,
            size_conditioning=size_conditioning,
        )
        return denoise(self, call)

    __call__ = run_to_end(stream)

    def _latent_shape(
        self, count: int, height: int | None, width: int | None, latents: Tensor | None
    ) -> tuple[int, int, int, int]:
        """[B, C, h, w] from height and width, else from the latents, else from the size of the training."""
        factor = self.decoder.config.spatial_factor
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
