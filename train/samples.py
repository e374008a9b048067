"""Validation images: drawn from fixed prompts, or made out of held-out images, with the weights of one moment."""

from __future__ import annotations

import math
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import NamedTuple, cast

from PIL import Image

from latentgen import __version__
from latentgen.diffusion.solver_names import SAMPLERS
from latentgen.errors import ConfigError
from latentgen.files import atomic_folder
from latentgen.image import save_image
from latentgen.pipelines.base import Pipeline
from latentgen.pipelines.denoising import PipelineStep
from latentgen.pipelines.inpaint import InpaintPipeline
from latentgen.pipelines.instruct_pix2pix import InstructPix2PixPipeline
from latentgen.pipelines.paired import PairedImagePipeline
from latentgen.pipelines.text_to_image import TextToImagePipeline
from latentgen.pipelines.upscale import UpscalePipeline
from latentgen.recipe import Recipe
from latentgen.train.config import Validation

SHEET = "sheet.png"
_GAP = 4
# That of training, for the networks. Latents are decoded in that of the decoder's weights: many overflow in float16.
Precision = Callable[[], AbstractContextManager[None]]


class Sample(NamedTuple):
    """One image, the stem of its file's name, and how it was drawn, if it was."""

    name: str
    image: Image.Image
    recipe: Recipe | None = None


class Example(NamedTuple):
    """A held-out image, what the model is shown of it, its caption, and where a model of inpainting is to paint."""

    caption: str
    shown: Image.Image
    true: Image.Image
    mask: Image.Image | None = None


def samples_folder(output_dir: Path, step: int) -> Path:
    """Where the images of a step stand."""
    return output_dir / "samples" / f"step-{step:08d}"


def latest_sheet(output_dir: Path) -> Path | None:
    """The newest sheet of a run."""
    return max((output_dir / "samples").glob(f"step-*/{SHEET}"), default=None)


def check_drawing(pipeline: Pipeline, validation: Validation) -> None:
    """Find out before training whether the prompts can be drawn.

    Raises:
        ConfigError: the pipeline is for another use.
        InputError: a prompt, the size or another argument is wrong.
    """
    for prompt in validation.prompts:
        _drawing(pipeline, validation, prompt)  # checked at once, drawn when it is read


def draw_prompts(
    pipeline: Pipeline, validation: Validation, step: int, precision: Precision
) -> list[list[Sample]]:
    """A row of images for each prompt, which does not depend on the other prompts."""
    rows = []
    for number, prompt in enumerate(validation.prompts):
        with precision():
            last = _last(_drawing(pipeline, validation, prompt))
        images = zip(cast("list[Image.Image]", last.images()), last.seeds, strict=True)
        rows.append(
            [
                Sample(
                    f"prompt-{number:02d}-seed-{seed}",
                    image,
                    _recipe(pipeline, validation, step, prompt, image, seed),
                )
                for image, seed in images
            ]
        )
    return rows


def remake(
    pipeline: Pipeline, examples: Sequence[Example], validation: Validation, step: int, precision: Precision
) -> list[list[Sample]]:
    """A row for each held-out image: what is shown of it, enlarged to its size, what is made of that, and itself."""
    rows = []
    for number, example in enumerate(examples):
        caption, shown, true, _ = example
        with precision():
            last = _last(_remaking(pipeline, example, validation))
        (made,) = cast("list[Image.Image]", last.images())
        recipe = _recipe(pipeline, validation, step, caption, made, validation.seed)
        name = f"image-{number:02d}"
        rows.append(
            [
                Sample(f"{name}-shown", shown.resize(true.size, Image.Resampling.NEAREST)),
                Sample(f"{name}-made", made, recipe),
                Sample(f"{name}-true", true),
            ]
        )
    return rows


def save_rows(folder: Path, rows: Sequence[Sequence[Sample]]) -> None:
    """Write each image with its recipe, and a sheet of all; what stood there is replaced.

    Raises:
        OutputError: the folder cannot be written.
    """
    if folder.is_dir():
        shutil.rmtree(folder)
    with atomic_folder(folder) as target:
        for sample in (sample for row in rows for sample in row):
            save_image(sample.image, target / f"{sample.name}.png", sample.recipe)
        save_image(sheet([[sample.image for sample in row] for row in rows]), target / SHEET)


def sheet(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """All images on one, row by row; where each row has one image, as near to a square as they fill."""
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


def _drawing(pipeline: Pipeline, validation: Validation, prompt: str) -> Iterator[PipelineStep]:
    return TextToImagePipeline.from_pipeline(pipeline).stream(
        prompt,
        negative_prompt=validation.negative_prompt,
        height=validation.height,
        width=validation.width,
        num_inference_steps=validation.num_inference_steps,
        guidance_scale=validation.guidance_scale,
        num_images_per_prompt=validation.images_per_prompt,
        seed=validation.seed,
        progress=False,
    )


def _remaking(pipeline: Pipeline, example: Example, validation: Validation) -> Iterator[PipelineStep]:
    if isinstance(pipeline, UpscalePipeline):
        stream = partial(pipeline.stream, image=example.shown, noise_level=0)
    elif isinstance(pipeline, InpaintPipeline) and example.mask is not None:
        stream = partial(pipeline.stream, image=example.shown, mask_image=example.mask)
    elif isinstance(pipeline, InstructPix2PixPipeline | PairedImagePipeline):
        stream = partial(pipeline.stream, image=example.shown)
    else:
        raise ConfigError("validation.images: this task makes no image out of another; leave it out")
    return stream(
        example.caption,
        negative_prompt=validation.negative_prompt,
        num_inference_steps=validation.num_inference_steps,
        guidance_scale=validation.guidance_scale,
        seed=validation.seed,
        progress=False,
    )


def _last(steps: Iterator[PipelineStep]) -> PipelineStep:
    (last,) = deque(steps, maxlen=1)
    return last


def _recipe(
    pipeline: Pipeline, validation: Validation, step: int, prompt: str, image: Image.Image, seed: int
) -> Recipe:
    sampler, schedule_type = SAMPLERS[pipeline.scheduler.name]
    scale = validation.guidance_scale
    return Recipe(
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
