"""Validation images: fixed prompts, drawn from fixed seeds with the weights of one moment."""

from __future__ import annotations

import math
import shutil
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import cast

from PIL import Image

from latentgen import __version__
from latentgen.diffusion.names import SAMPLERS
from latentgen.files import atomic_folder
from latentgen.image import save_image
from latentgen.pipelines.base import Pipeline
from latentgen.pipelines.text_to_image import TextToImagePipeline
from latentgen.recipe import Recipe
from latentgen.train.config import Validation

SHEET = "sheet.png"
_GAP = 4


def samples_folder(output_dir: Path, step: int) -> Path:
    """Where the images of a step stand."""
    return output_dir / "samples" / f"step-{step:08d}"


def latest_sheet(output_dir: Path) -> Path | None:
    """The newest sheet of a run."""
    return max((output_dir / "samples").glob(f"step-*/{SHEET}"), default=None)


def draw_rows(
    pipeline: Pipeline, validation: Validation, precision: Callable[[], AbstractContextManager[None]]
) -> list[list[Image.Image]]:
    """The images of each prompt, which do not depend on the other prompts.

    Args:
        pipeline: what draws.
        validation: what, and how.
        precision: in which the networks are trained. Latents are decoded in that of the decoder's weights: many
            decoders overflow in float16.
    """
    draw = TextToImagePipeline.from_pipeline(pipeline)
    rows = []
    for prompt in validation.prompts:
        with precision():
            (last,) = deque(
                draw.stream(
                    prompt,
                    negative_prompt=validation.negative_prompt,
                    height=validation.height,
                    width=validation.width,
                    num_inference_steps=validation.num_inference_steps,
                    guidance_scale=validation.guidance_scale,
                    num_images_per_prompt=validation.images_per_prompt,
                    seed=validation.seed,
                    progress=False,
                ),
                maxlen=1,
            )
        rows.append(cast("list[Image.Image]", last.images()))
    return rows


def save_rows(
    folder: Path, rows: Sequence[Sequence[Image.Image]], validation: Validation, pipeline: Pipeline, step: int
) -> None:
    """Write each image with its recipe, and a sheet of all, a row for each prompt; what stood there is replaced.

    Raises:
        OutputError: the folder cannot be written.
    """
    if folder.is_dir():
        shutil.rmtree(folder)
    sampler, schedule_type = SAMPLERS[pipeline.scheduler.name]
    scale = validation.guidance_scale
    with atomic_folder(folder) as target:
        for number, (prompt, images) in enumerate(zip(validation.prompts, rows, strict=True)):
            for seed, image in enumerate(images, start=validation.seed):
                recipe = Recipe(
                    prompt=prompt,
                    negative_prompt=validation.negative_prompt,
                    steps=validation.num_inference_steps,
                    sampler=sampler,
                    schedule_type=schedule_type,
                    guidance_scale=pipeline.default_guidance_scale if scale is None else scale,
                    seed=seed,
                    width=image.width,
                    height=image.height,
                    version=f"latentgen {__version__}",
                    other=(("Training step", str(step)),),
                )
                save_image(image, target / f"prompt-{number:02d}-seed-{seed}.png", recipe)
        save_image(sheet(rows), target / SHEET)


def sheet(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """All images on one: a row for each prompt, or, where each has one image, as near to a square as they fill."""
    if all(len(images) == 1 for images in rows):
        pictures = [images[0] for images in rows]
        columns = math.ceil(math.sqrt(len(pictures)))
        rows = [pictures[start : start + columns] for start in range(0, len(pictures), columns)]
    width = max(image.width for images in rows for image in images) + _GAP
    height = max(image.height for images in rows for image in images) + _GAP
    paper = Image.new("RGB", (max(map(len, rows)) * width - _GAP, len(rows) * height - _GAP), "white")
    for row, images in enumerate(rows):
        for column, image in enumerate(images):
            paper.paste(image, (column * width, row * height))
    return paper
