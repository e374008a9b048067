"""Text to image: prompts to context, noise to latents, latents to images (arXiv:2112.10752)."""

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
    """Images from text: Stable Diffusion 1.x and 2.x, SDXL, its refiner, what was distilled from them, and small models
    that work on pixels.

    The stages, and how they are loaded, are those of :class:`Pipeline`; of the VAE only the decoder is.
    """

    supported_classes: ClassVar[tuple[str, ...]] = classes_read_by("TextToImagePipeline")

    @property
    def diffusers_class(self) -> str:
        """The class of diffusers' pipeline over the same stages; on pixels one of our own."""
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
        """Make images of prompts, step by step: each step can show a preview, and the last one gives the result.

        Calling the pipeline takes the same arguments, runs to the end and gives an :class:`Output`. All arguments are
        checked at once, before the first step. To cancel, stop iterating.

        Args:
            prompt: one prompt or several; of any length, none is cut. Or what a text encoder has made of them already,
                `Conditioning(context, pooled)`: in diffusers prompt_embeds and pooled_prompt_embeds.
            negative_prompt: what to lead away from, likewise: one for all prompts or one for each; None is the empty
                prompt.
            prompt_syntax: "explicit" reads `(text:1.2)` as a weight, and `\\(` as a parenthesis; all else is text.
                "a1111" also reads `(text)` as 1.1, `[text]` as 1 / 1.1, `BREAK`, `[from:to:when]`, `[to:when]`,
                `[from::when]` and `[one|other]`; `when` is a number of steps, or a share of them where it has a point.
                In "plain" every sign is text.
            height: pixels, a multiple of what one latent covers (8 in Stable Diffusion); by default the size
                that the model was trained at.
            width: likewise.
            num_inference_steps: steps of the solver, over the whole schedule.
            timesteps: falling, one for each step, in place of `num_inference_steps` and of the scheduler's spacing.
            sigmas: likewise noise levels sigma / alpha, and at the end of the list that where the run ends, mostly 0;
                of flow-matching models sigma itself, before the shift, and the end may be left out.
            guidance_scale: scale of classifier-free guidance (arXiv:2207.12598, eq. 6, as 1 + w); 1 or less
                is no guidance, in half the time. By default the checkpoint's own, where it has one (the embedded
                model), else 7.5, or 5 for SDXL, as in diffusers.
            guidance: what guidance does besides: rescaling, an interval, a perpendicular negative prompt.
            num_images_per_prompt: images of each prompt.
            seed: image i of the call gets seed + i; or one seed for each image; None draws one at random.
            scheduler: for this call, the name of a solver, a whole Scheduler or one of diffusers; by default the
                checkpoint's.
            latents: [B, C, h, w] to start from, in place of what the seeds draw: standard normal noise, or with
                `denoising_start` what another pipeline ended with.
            denoising_start: 0..1, at which share of the schedule to begin, with the `latents` of a pipeline whose
                `denoising_end` was the same; how SDXL's refiner goes on where the base model stops.
            denoising_end: 0..1, at which share to stop; take `output_type="latent"` with it.
            clip_skip: how many more layers of the text encoder the prompts go without.
            size_conditioning: what SDXL is told of sizes.
            output_type: "pil", "np", "pt" or "latent"; see Output.
            progress: show a progress bar.

        Raises:
            InputError: an argument is out of bounds; nothing has been computed.
            NumericalError: NaN or infinity where an image was due; names the step.
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
        given = None if latents is None else check_latents(latents, shape)

        def prepare_latents(noise: ImageNoise) -> InitialLatents:
            start = noise.draw(shape[1:]) if given is None else given.to(self.device)
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
        """[B, C, h, w] from the size asked for, else that of given latents, else that of the training."""
        factor = self.decoder.config.spatial_factor
        size = self.unet.config.sample_size
        if isinstance(latents, Tensor) and latents.ndim == 4:
            size = (latents.shape[2], latents.shape[3])
        height, width = check_size(height, width, size, factor)
        return (count, self.decoder.config.latent_channels, height // factor, width // factor)


def part_of_run(
    sampling: Sampling, denoising_start: float, denoising_end: float, latents: Tensor | None
) -> Sampling:
    """The part of a run that lies between two shares of the schedule."""
    scheduler, levels, _ = sampling
    start = scheduler.steps_before(levels, check_fraction("denoising_start", denoising_start))
    stop = scheduler.steps_before(levels, check_fraction("denoising_end", denoising_end))
    if start >= stop:
        raise InputError(
            f"between denoising_start={denoising_start} and denoising_end={denoising_end} lies none of the "
            f"{len(levels) - 1} steps; use more steps or a wider part"
        )
    if start > 0 and latents is None:
        raise InputError(
            f"denoising_start={denoising_start} needs the latents that it starts from: the output of a pipeline "
            'with the same denoising_end and output_type="latent"'
        )
    return sampling._replace(steps=range(start, stop))
