"""One call of a drawing command: checked before anything heavy is imported, then drawn, and written with its recipe."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, cast

from latentgen import __version__
from latentgen.cli.options import ModelOptions, OutputOptions, PromptOptions, SamplingOptions, model_name
from latentgen.cli.text import printable
from latentgen.diffusion.solver_names import SAMPLERS
from latentgen.recipe import Recipe

if TYPE_CHECKING:
    from PIL.Image import Image

    from latentgen.pipelines.base import Pipeline
    from latentgen.pipelines.output import Output


class Job:
    """What a drawing command was asked for, but for what is its own.

    Raises:
        LatentgenError: the output cannot be written, or nobody knows the scheduler.
    """

    def __init__(
        self,
        prompt: str,
        model: ModelOptions,
        prompting: PromptOptions,
        sampling: SamplingOptions,
        output: OutputOptions,
    ) -> None:
        from latentgen.image import check_output

        self.prompt, self.model, self.output = prompt, model, output
        self.prompting, self.sampling = prompting, sampling
        self.paths = output.paths(prompting.num_images)
        for path in self.paths:
            check_output(path)
        self.solver = sampling.solver

    def draw(
        self,
        pipeline: Pipeline,
        call: Callable[..., Output],
        *,
        denoising_strength: float | None = None,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        """Draw, write the images, and print their names.

        Args:
            pipeline: what draws.
            call: the pipeline's call with the arguments of this command alone.
            denoising_strength: for the recipe.
            settings: what else the recipe is to say, in its words.
        """
        from latentgen.image import save_image
        from latentgen.pipelines.base import DEFAULT_STEPS

        prompting, sampling = self.prompting, self.sampling
        steps = DEFAULT_STEPS if sampling.steps is None else sampling.steps
        guidance = pipeline.default_guidance_scale if sampling.guidance is None else sampling.guidance
        result = call(
            negative_prompt=prompting.negative,
            prompt_syntax=prompting.prompt_syntax,
            num_inference_steps=steps,
            guidance_scale=guidance,
            num_images_per_prompt=prompting.num_images,
            seed=prompting.seed,
            scheduler=self.solver,
            progress=sys.stderr.isatty(),
        )
        if prompting.seed is None:
            print(f"seed: {', '.join(map(str, result.seeds))}", file=sys.stderr)
        sampler, schedule_type = SAMPLERS[self.solver or pipeline.scheduler.name]
        images = cast("list[Image]", result.images)
        for path, image, seed in zip(self.paths, images, result.seeds, strict=True):
            recipe = Recipe(
                prompt=self.prompt,
                negative_prompt=prompting.negative,
                steps=steps,
                sampler=sampler,
                schedule_type=schedule_type,
                guidance_scale=guidance,
                seed=seed,
                width=image.width,
                height=image.height,
                model=model_name(self.model.model),
                denoising_strength=denoising_strength,
                version=f"latentgen {__version__}",
                other=(*(settings or {}).items(), *self._settings().items()),
            )
            save_image(image, path, None if self.output.no_metadata else recipe)
            print(printable(str(path)))

    def _settings(self) -> dict[str, str]:
        vae, adapters = self.model.vae, self.model.adapters
        settings = self.prompting.syntax_setting
        if vae:
            settings["VAE"] = vae.name
        if adapters:
            settings["LoRA"] = ", ".join(f"{file.stem}:{weight:g}" for file, weight in adapters)
        return settings


def clip_skip_setting(layers: int) -> dict[str, str]:
    """How a recipe tells it: other programs count the layers that clip skip begins at."""
    return {"Clip skip": str(layers + 1)} if layers else {}
