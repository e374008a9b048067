"""Validation during a run: images of fixed prompts or of validation images, and the loss on validation images."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

from latentgen import __version__
from latentgen.diffusion.solver_names import SAMPLERS
from latentgen.errors import ConfigError
from latentgen.files import atomic_folder
from latentgen.generation_parameters import GenerationParameters
from latentgen.image_file import save_image
from latentgen.pipelines.base import Pipeline
from latentgen.pipelines.sampling_loop import PipelineStep
from latentgen.pipelines.text_to_image import TextToImagePipeline
from latentgen.pipelines.upscale import UpscalePipeline
from latentgen.train.config import TrainConfig, Validation
from latentgen.train.data import BatchIndices, CaptionedDataset, sample_rng
from latentgen.train.host_memory import temporarily_on
from latentgen.train.metrics import Metrics
from latentgen.train.objectives.base import Example, Objective

SHEET = "sheet.png"
_GAP = 4


class NamedImage(NamedTuple):
    """An image, the stem of its file name, and its generation parameters if a pipeline generated it."""

    name: str
    image: Image.Image
    parameters: GenerationParameters | None = None


class Validator:
    """The validation of one run. It does not change the training: see `ema_scope`.

    It uses the moving average `ema` of the weights if there is one, as the finished model does. The main process works,
    the others wait; all must call the methods. `data` are the images to measure the loss on, if it is measured.

    Raises:
        ConfigError: the task cannot do what the recipe asks for.
    """

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        objective: Objective,
        ema: Mapping[str, Tensor],
        data: CaptionedDataset | None,
        metrics: Metrics,
    ) -> None:
        assert config.validation is not None
        self._config = config
        self._validation = config.validation
        self._accelerator = accelerator
        self._objective = objective
        self._ema = ema
        self._metrics = metrics
        self._loss_objective: Objective | None = None
        self._examples: list[Example] = []
        if data is None:
            return
        self._loss_objective = objective.for_validation(data, self._validation.seed)
        if accelerator.is_main_process:
            for item in range(min(self._validation.images, len(data))):
                rng = sample_rng(self._validation.seed, "example", item)
                self._examples.append(objective.validation_example(data.sample(item, rng), rng))

    def start(self, step: int) -> None:
        """Validate before the first step, or catch up on what a run that was stopped after `step` did not validate."""
        images = self._images_are_due(step) and not _step_folder(self._config.output_dir, step).is_dir()
        self._validate(step, images, self._loss_is_due(step) and not self._metrics.has_validation(step))

    def after_step(self, step: int) -> None:
        """Validate if the recipe says so after this step."""
        images, loss = self._images_are_due(step), self._loss_is_due(step)
        if images or loss:
            start = time.monotonic()
            self._validate(step, images, loss)
            self._metrics.exclude_time(time.monotonic() - start)

    def _images_are_due(self, step: int) -> bool:
        validation = self._validation
        return bool(validation.prompts or validation.images) and self._is_due(step, validation.every)

    def _loss_is_due(self, step: int) -> bool:
        return self._config.measures and self._is_due(step, self._validation.loss_every)

    def _is_due(self, step: int, every: int) -> bool:
        if not step:
            return self._validation.at_start
        return step % every == 0 or step == self._config.max_steps

    def _validate(self, step: int, images: bool, loss: bool) -> None:
        if self._accelerator.is_main_process:
            if images:
                self._make_images(step)
            if loss:
                self._measure_loss(step)
        self._accelerator.wait_for_everyone()

    def _make_images(self, step: int) -> None:
        pipeline = self._objective.pipeline()
        assert pipeline is not None  # the preflight has refused such a recipe
        with preview(self._objective, pipeline, self._ema) as pipeline:
            prompts = enumerate(self._validation.prompts)
            rows = [self._prompt_row(pipeline, step, number, prompt) for number, prompt in prompts]
            examples = enumerate(self._examples)
            rows += [self._example_row(pipeline, step, number, example) for number, example in examples]
        save_rows(_step_folder(self._config.output_dir, step), rows)
        self._metrics.log_images(step, [[named.image for named in row] for row in rows])

    def _prompt_row(self, pipeline: Pipeline, step: int, number: int, prompt: str) -> list[NamedImage]:
        """The images of a prompt, which do not depend on the other prompts."""
        last = self._run(_prompt_stream(pipeline, self._validation, prompt))
        images = zip(cast("list[Image.Image]", last.images()), last.seeds, strict=True)
        parameters = partial(_parameters, pipeline, self._validation, step, prompt)
        return [
            NamedImage(f"prompt-{number:02d}-seed-{seed}", image, parameters(image, seed))
            for image, seed in images
        ]

    def _example_row(self, pipeline: Pipeline, step: int, number: int, example: Example) -> list[NamedImage]:
        """The model's input of a validation image, enlarged to its size; the model's output; and the image."""
        last = self._run(_example_stream(pipeline, self._validation, example))
        (output,) = cast("list[Image.Image]", last.images())
        parameters = _parameters(
            pipeline, self._validation, step, example.caption, output, self._validation.seed
        )
        enlarged = example.input.resize(example.target.size, Image.Resampling.NEAREST)
        return [
            NamedImage(f"image-{number:02d}-shown", enlarged),
            NamedImage(f"image-{number:02d}-made", output, parameters),
            NamedImage(f"image-{number:02d}-true", example.target),
        ]

    def _run(self, steps: Iterator[PipelineStep]) -> PipelineStep:
        """The last step. The networks run as in training; the latents are decoded later, in the decoder's dtype."""
        with self._accelerator.autocast():  # not around the decoder, which may overflow in float16
            (last,) = deque(steps, maxlen=1)
        return last

    @torch.no_grad()
    def _measure_loss(self, step: int) -> None:
        objective, config = self._loss_objective, self._config
        if objective is None:
            return
        # As many samples at once as in training.
        at_once = config.batch_size // (config.gradient_accumulation_steps * self._accelerator.num_processes)
        means: dict[str, float] = {}
        count = len(objective.order)
        with ema_scope(objective, self._ema), self._accelerator.autocast():
            for items in objective.order.parts(at_once):
                plan = BatchIndices(self._validation.seed, 0, count, items, items)
                loss = objective.validation_loss(plan, self._validation.timesteps)
                for name, value in {"loss": loss.total, **loss.parts}.items():
                    means[name] = means.get(name, 0.0) + len(items) / count * float(value)
        self._metrics.write_validation(step, means.pop("loss"), means)


def latest_sheet(output_dir: Path) -> Path | None:
    """The newest sheet of the validation images of a run."""
    return max((output_dir / "samples").glob(f"step-*/{SHEET}"), default=None)


def check_validation(validation: Validation, held_out: CaptionedDataset | None, objective: Objective) -> None:
    """Refuse, before training, validation images that cannot be generated.

    Raises:
        ConfigError: the model does not take what the recipe gives it.
        DatasetError: the validation images lack what the model takes as input.
        InputError: a prompt, the size or another argument is wrong.
    """
    pipeline = objective.pipeline()
    if pipeline is None:
        return
    if pipeline.unet.config.in_channels == pipeline.decoder.config.latent_channels:
        if validation.images:
            raise ConfigError(
                "validation.images: this model does not take an image as input; remove it, and set validation.prompts"
            )
    elif validation.prompts:
        raise ConfigError(
            "validation.prompts: this model also requires an image; remove them, and set validation_fraction or "
            "validation.data, and validation.images"
        )
    elif held_out is not None:
        rng = sample_rng(validation.seed, "example", 0)
        objective.validation_example(held_out.sample(0, rng), rng)
    with preview(objective, pipeline, {}) as previewed:
        for prompt in validation.prompts:
            # This checks the arguments now; it would compute only when iterated.
            _prompt_stream(previewed, validation, prompt)


def save_rows(folder: Path, rows: Sequence[Sequence[NamedImage]]) -> None:
    """Write each image with its generation parameters, and a sheet of all; an existing folder is replaced.

    Raises:
        OutputError: the folder cannot be written.
    """
    with atomic_folder(folder, replace=True) as target:
        for row in rows:
            for named in row:
                save_image(named.image, target / f"{named.name}.png", named.parameters)
        save_image(sheet([[named.image for named in row] for row in rows]), target / SHEET)


def sheet(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """All images on one sheet, row by row; rows of one image each are arranged in a square instead."""
    if all(len(images) == 1 for images in rows):
        images = [row[0] for row in rows]
        columns = math.ceil(math.sqrt(len(images)))
        rows = [images[start : start + columns] for start in range(0, len(images), columns)]
    width = max(image.width for images in rows for image in images) + _GAP
    height = max(image.height for images in rows for image in images) + _GAP
    paper = Image.new("RGB", (max(map(len, rows)) * width - _GAP, len(rows) * height - _GAP), "white")
    for row, images in enumerate(rows):
        for column, image in enumerate(images):
            paper.paste(image, (column * width, row * height))
    return paper


def _step_folder(output_dir: Path, step: int) -> Path:
    return output_dir / "samples" / f"step-{step:08d}"


def _prompt_stream(pipeline: Pipeline, validation: Validation, prompt: str) -> Iterator[PipelineStep]:
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


def _example_stream(pipeline: Pipeline, validation: Validation, example: Example) -> Iterator[PipelineStep]:
    arguments: dict[str, Any] = {} if example.mask is None else {"mask_image": example.mask}
    if isinstance(pipeline, UpscalePipeline):
        arguments = {"noise_level": 0}
    of_images: Any = pipeline  # one that takes an image: see check_validation
    return of_images.stream(
        example.caption,
        image=example.input,
        **arguments,
        negative_prompt=validation.negative_prompt,
        num_inference_steps=validation.num_inference_steps,
        guidance_scale=validation.guidance_scale,
        seed=validation.seed,
        progress=False,
    )


def _parameters(
    pipeline: Pipeline, validation: Validation, step: int, prompt: str, image: Image.Image, seed: int
) -> GenerationParameters:
    sampler, schedule_type = SAMPLERS[pipeline.scheduler.name]
    scale = validation.guidance_scale
    return GenerationParameters(
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


@contextmanager
def ema_scope(module: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside the block `module` is in evaluation mode, uncompiled, and has `weights` instead of its own.

    Afterwards everything is restored bit for bit: parameters have the same storage, of which an optimizer may hold
    views; every submodule has its mode; and torch's generators have their states.

    Args:
        module: the module being trained.
        weights: by parameter name, on any device; parameters that are not named keep their values.
    """
    parameters = dict(module.named_parameters())
    trained = {name: parameters[name].data for name in weights}
    modes = [(part, part.training) for part in module.modules()]
    cuda = sorted({p.device.index for p in parameters.values() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=cuda), torch.compiler.set_stance("force_eager"):
        try:
            for name, weight in weights.items():
                parameters[name].data = weight.to(trained[name])
            module.eval()
            yield
        finally:
            for name, own in trained.items():
                parameters[name].data = own
            for part, mode in modes:
                part.training = mode


@contextmanager
def preview(objective: Objective, pipeline: Pipeline, weights: Mapping[str, Tensor]) -> Iterator[Pipeline]:
    """The pipeline of an objective, generating with `weights` on the training device; see `ema_scope`.

    The decoder and the text encoder are on that device inside the block only.
    """
    device, backend = next(objective.parameters()).device, pipeline.unet.attention_backend
    others = nn.ModuleList([pipeline.decoder, pipeline.text_encoder.module])
    with ema_scope(objective, weights), temporarily_on(others, device):
        try:
            yield replace(pipeline, device=device)
        finally:
            pipeline.unet.attention_backend = backend
