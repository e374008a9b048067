"""The work of the generating commands: check, call the pipeline, and write the images with their recipes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar, cast

from latentgen import __version__
from latentgen.cli.options import (
    DType,
    ModelOptions,
    OutputOptions,
    PromptOptions,
    SamplingOptions,
    StageOptions,
    model_name,
    printable,
)
from latentgen.diffusion.solver_names import SAMPLERS
from latentgen.errors import InputError
from latentgen.recipe import Recipe

if TYPE_CHECKING:
    from PIL.Image import Image

    from latentgen.pipelines.base import Pipeline
    from latentgen.pipelines.cascade import CascadePipeline, StageResult, StageSettings
    from latentgen.pipelines.sampling_loop import Output

Value = TypeVar("Value", int, float, str)


class Job:
    """The shared options of a generating command, checked before anything heavy is imported.

    Raises:
        LatentgenError: the output cannot be written, or the scheduler is unknown.
    """

    def __init__(
        self,
        prompt: str,
        model: ModelOptions,
        prompting: PromptOptions,
        sampling: SamplingOptions,
        output: OutputOptions,
    ) -> None:
        from latentgen.image_file import check_output

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
        """Generate, write the images, and print their paths.

        Args:
            pipeline: the loaded pipeline.
            call: its call, with the arguments that only this command has.
            denoising_strength: for the recipe.
            settings: further settings for the recipe.
        """
        from latentgen.image_file import save_image
        from latentgen.pipelines.call import DEFAULT_STEPS

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
        images = cast("list[Image]", result.images)
        for path, image, seed in zip(self.paths, images, result.seeds, strict=True):
            recipe = _recipe(
                self.prompt,
                prompting,
                image,
                seed,
                steps=steps,
                scheduler=self.solver or pipeline.scheduler.name,
                guidance_scale=guidance,
                model=self.model.model,
                denoising_strength=denoising_strength,
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
    """The recipe's setting: other programs count from 1, which skips no layer."""
    return {"Clip skip": str(layers + 1)} if layers else {}


def draw_cascade(
    prompt: str,
    prompting: PromptOptions,
    stages: StageOptions,
    output: OutputOptions,
    *,
    model: str | None,
    dtype: DType,
    device: str,
    all_stages: bool,
) -> None:
    """Generate with a cascade, write the images, and print their paths.

    Raises:
        LatentgenError: what is wrong with an option, or with the cascade's files, in a subclass.
    """
    from latentgen.image_file import check_output, save_image

    paths = output.paths(prompting.num_images)
    for path in paths:
        check_output(path)

    from latentgen.pipelines.cascade import CascadePipeline

    pipeline = CascadePipeline.from_pretrained(model, dtype=dtype, device=device)
    results = pipeline.stream(
        prompt,
        negative_prompt=prompting.negative,
        prompt_syntax=prompting.prompt_syntax,
        num_images_per_prompt=prompting.num_images,
        seed=prompting.seed,
        settings=stage_settings(stages, pipeline),
        progress=sys.stderr.isatty(),
    )
    summary = ""
    for result in results:
        if prompting.seed is None and result.index == 0:
            print(f"seed: {', '.join(map(str, result.seeds))}", file=sys.stderr)
        summary = f"{summary}; {_stage_summary(result)}".removeprefix("; ")
        is_last = result.index == result.total - 1
        if not (is_last or all_stages):
            continue
        for path, image, seed in zip(paths, cast("list[Image]", result.images), result.seeds, strict=True):
            target = path if is_last else path.with_stem(f"{path.stem}-{result.index + 1}-{result.name}")
            recipe = _recipe(
                prompt,
                prompting,
                image,
                seed,
                steps=result.settings.num_inference_steps,
                scheduler=str(result.settings.scheduler),
                guidance_scale=cast(float, result.settings.guidance_scale),
                model=model,
                other=(("Cascade", summary), *prompting.syntax_setting.items()),
            )
            save_image(image, target, None if output.no_metadata else recipe)
            print(printable(str(target)))


def stage_settings(options: StageOptions, cascade: CascadePipeline) -> list[StageSettings]:
    """The settings of each stage: from the command line, else the cascade's own.

    Raises:
        InputError: the number of values is not that of the stages, or a value is out of bounds.
    """
    settings = [stage.settings for stage in cascade.stages]
    chosen = {
        "num_inference_steps": _values("--steps", options.steps, int, len(settings)),
        "guidance_scale": _values("--guidance", options.guidance, float, len(settings)),
        "scheduler": _values("--scheduler", options.scheduler, str, len(settings)),
        "noise_level": _values("--noise-level", options.noise_level, int, len(settings)),
        "strength": _values("--strength", options.strength, float, len(settings)),
    }
    return [
        replace(own, **{name: values[index] for name, values in chosen.items() if values[index] is not None})
        for index, own in enumerate(settings)
    ]


def _values(
    option: str, text: str | None, kind: Callable[[str], Value], count: int
) -> Sequence[Value | None]:
    """The value of an option for each of `count` stages; None keeps the stage's own."""
    parts = [""] if text is None else [part.strip() for part in text.split(",")]
    if len(parts) not in (1, count):
        raise InputError(
            f"{option} has {len(parts)} values for {count} stages; give one value, or one per stage"
        )
    try:
        values = [None if part in ("", "-") else kind(part) for part in parts]
    except ValueError as error:
        raise InputError(f"{option}={text}: {error}; give numbers separated by commas") from None
    return values * count if len(values) == 1 else values


def _stage_summary(result: StageResult) -> str:
    """One stage's settings as a phrase of the recipe."""
    settings = result.settings
    sampler = " ".join(filter(None, SAMPLERS[str(settings.scheduler)]))
    noise = {
        "upscale": f", noise level {settings.noise_level}",
        "redraw": f", denoising strength {settings.strength:g}",
    }.get(result.kind, "")
    steps = settings.num_inference_steps
    return f"{result.name}: {steps} steps, {sampler}, CFG scale {settings.guidance_scale:g}{noise}"


def _recipe(
    prompt: str,
    prompting: PromptOptions,
    image: Image,
    seed: int,
    *,
    steps: int,
    scheduler: str,
    guidance_scale: float,
    model: str | None,
    denoising_strength: float | None = None,
    other: Iterable[tuple[str, str]] = (),
) -> Recipe:
    sampler, schedule_type = SAMPLERS[scheduler]
    return Recipe(
        prompt=prompt,
        negative_prompt=prompting.negative,
        steps=steps,
        sampler=sampler,
        schedule_type=schedule_type,
        guidance_scale=guidance_scale,
        seed=seed,
        width=image.width,
        height=image.height,
        model=model_name(model),
        denoising_strength=denoising_strength,
        version=f"latentgen {__version__}",
        other=tuple(other),
    )
