"""The work of `latentgen cascade`: its options for each stage, and what it writes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar, cast

from latentgen import __version__
from latentgen.cli.options import DType, OutputOptions, PromptOptions, StageOptions, model_name
from latentgen.cli.text import printable
from latentgen.diffusion.solver_names import SAMPLERS
from latentgen.errors import InputError
from latentgen.recipe import Recipe

if TYPE_CHECKING:
    from PIL.Image import Image

    from latentgen.pipelines.cascade import CascadePipeline, StageResult, StageSettings

Value = TypeVar("Value", int, float, str)


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
    """Draw, write the images, and print their names.

    Raises:
        LatentgenError: what is wrong with an option, or with the cascade's files, in a subclass.
    """
    from latentgen.image import check_output, save_image

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
    told = ""
    for result in results:
        if prompting.seed is None and result.index == 0:
            print(f"seed: {', '.join(map(str, result.seeds))}", file=sys.stderr)
        told = f"{told}; {_told(result)}".removeprefix("; ")
        is_last = result.index == result.total - 1
        if not (is_last or all_stages):
            continue
        for path, image, seed in zip(paths, cast("list[Image]", result.images), result.seeds, strict=True):
            target = path if is_last else path.with_stem(f"{path.stem}-{result.index + 1}-{result.name}")
            recipe = _recipe(prompt, prompting, result, image, seed, told, model)
            save_image(image, target, None if output.no_metadata else recipe)
            print(printable(str(target)))


def stage_settings(options: StageOptions, cascade: CascadePipeline) -> list[StageSettings]:
    """The settings of each stage: those of the command line, else the cascade's own.

    Raises:
        InputError: another number of values than stages, or one that is out of bounds.
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
    """The value of an option for each of `count` stages; None is the stage's own."""
    parts = [""] if text is None else [part.strip() for part in text.split(",")]
    if len(parts) not in (1, count):
        raise InputError(f"{option} has {len(parts)} values for {count} stages; give one, or one for each")
    try:
        values = [None if part in ("", "-") else kind(part) for part in parts]
    except ValueError as error:
        raise InputError(f"{option}={text}: {error}; give numbers with commas between them") from None
    return values * count if len(values) == 1 else values


def _told(result: StageResult) -> str:
    """A stage in one phrase, for the recipe."""
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
    result: StageResult,
    image: Image,
    seed: int,
    told: str,
    model: str | None,
) -> Recipe:
    settings = result.settings
    sampler, schedule_type = SAMPLERS[str(settings.scheduler)]
    return Recipe(
        prompt=prompt,
        negative_prompt=prompting.negative,
        steps=settings.num_inference_steps,
        sampler=sampler,
        schedule_type=schedule_type,
        guidance_scale=cast(float, settings.guidance_scale),
        seed=seed,
        width=image.width,
        height=image.height,
        model=model_name(model),
        version=f"latentgen {__version__}",
        other=(("Cascade", told), *prompting.syntax_setting.items()),
    )
