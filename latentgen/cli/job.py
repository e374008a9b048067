"""The work of the generating commands: check, call the pipeline, and write the images and their parameters."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from latentgen import __version__
from latentgen.cli.options import CallOptions, CascadeOptions, PipelineOptions, model_name, printable
from latentgen.diffusion.solver_names import SAMPLERS, canonical_name
from latentgen.errors import InputError
from latentgen.generation_parameters import GenerationParameters

if TYPE_CHECKING:
    from latentgen.pipelines.base import Pipeline
    from latentgen.pipelines.cascade import CascadePipeline, StageResult, StageSettings

Value = TypeVar("Value", int, float, str)


def draw(kind: type[Pipeline], prompt: str, options: PipelineOptions, arguments: Mapping[str, Any]) -> None:
    """Load the model, generate with the command's own arguments, write the images, and print their paths."""
    from latentgen.pipelines.call import DEFAULT_STEPS

    pipeline: Any = options.load(kind)
    steps = DEFAULT_STEPS if options.steps is None else options.steps
    guidance = pipeline.default_guidance_scale if options.guidance is None else options.guidance
    solver = None if options.scheduler is None else canonical_name(options.scheduler)
    result = pipeline(
        prompt,
        negative_prompt=options.negative,
        prompt_syntax=options.prompt_syntax,
        num_inference_steps=steps,
        guidance_scale=guidance,
        num_images_per_prompt=options.num_images,
        seed=options.seed,
        scheduler=solver,
        progress=sys.stderr.isatty(),
        **arguments,
    )
    options.print_random(result.seeds)
    _write(
        result,
        options.paths,
        options,
        prompt=prompt,
        steps=steps,
        scheduler=solver or pipeline.scheduler.name,
        guidance_scale=guidance,
        denoising_strength=arguments.get("strength"),
        other={**_settings(arguments), **options.settings},
    )


def _settings(arguments: Mapping[str, Any]) -> dict[str, str]:
    """The generation parameters for the arguments that only one command has."""
    settings = {}
    if "image_guidance_scale" in arguments:
        settings["Image CFG scale"] = f"{arguments['image_guidance_scale']:g}"
    if "noise_level" in arguments:
        settings["Noise level"] = str(arguments["noise_level"])
    if arguments.get("clip_skip"):  # other programs count from 1, which skips no layer
        settings["Clip skip"] = str(arguments["clip_skip"] + 1)
    if arguments.get("match_input"):
        settings["Match input"] = "True"
    if arguments.get("mask_blur"):
        settings["Mask blur"] = f"{arguments['mask_blur']:g}"
    if arguments.get("padding_mask_crop") is not None:
        settings["Inpaint area"] = "Only masked"
        settings["Masked area padding"] = str(arguments["padding_mask_crop"])
    return settings


def draw_cascade(prompt: str, options: CascadeOptions) -> None:
    """Generate with a cascade, write the images, and print their paths."""
    from latentgen.pipelines.cascade import CascadePipeline

    pipeline = CascadePipeline.from_pretrained(options.model, dtype=options.dtype, device=options.device)
    results = pipeline.stream(
        prompt,
        negative_prompt=options.negative,
        prompt_syntax=options.prompt_syntax,
        num_images_per_prompt=options.num_images,
        seed=options.seed,
        settings=_stage_settings(options, pipeline),
        progress=sys.stderr.isatty(),
    )
    summaries = []
    for result in results:
        if result.index == 0:
            options.print_random(result.seeds)
        summaries.append(_stage_summary(result))
        is_last = result.index == result.total - 1
        if not (is_last or options.all_stages):
            continue
        suffix = "" if is_last else f"-{result.index + 1}-{result.name}"
        _write(
            result,
            [path.with_stem(path.stem + suffix) for path in options.paths],
            options,
            prompt=prompt,
            steps=result.settings.num_inference_steps,
            scheduler=str(result.settings.scheduler),
            guidance_scale=result.settings.guidance_scale,
            other={"Cascade": "; ".join(summaries), **options.settings},
        )


def _stage_settings(options: CascadeOptions, cascade: CascadePipeline) -> list[StageSettings]:
    """The settings of each stage: from the command line, else the cascade's own."""
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
    """One stage's settings as a phrase."""
    settings = result.settings
    sampler = " ".join(filter(None, SAMPLERS[str(settings.scheduler)]))
    noise = {
        "upscale": f", noise level {settings.noise_level}",
        "redraw": f", denoising strength {settings.strength:g}",
    }.get(result.kind, "")
    steps = settings.num_inference_steps
    return f"{result.name}: {steps} steps, {sampler}, CFG scale {settings.guidance_scale:g}{noise}"


def _write(
    result: Any,
    paths: Sequence[Path],
    options: CallOptions,
    *,
    scheduler: str,
    other: Mapping[str, str],
    **fields: Any,
) -> None:
    """Write the images of a call with their generation parameters, and print their paths."""
    from latentgen.image_file import save_image

    sampler, schedule_type = SAMPLERS[scheduler]
    for path, image, seed in zip(paths, result.images, result.seeds, strict=True):
        parameters = GenerationParameters(
            negative_prompt=options.negative,
            sampler=sampler,
            schedule_type=schedule_type,
            model=model_name(options.model),
            version=f"latentgen {__version__}",
            other=tuple(other.items()),
            seed=seed,
            width=image.width,
            height=image.height,
            **fields,
        )
        save_image(image, path, None if options.no_metadata else parameters)
        print(printable(str(path)))
