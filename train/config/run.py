"""A whole recipe: its sections, and their consistency."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from latentgen.files import quote
from latentgen.prompts import check_prompts
from latentgen.train.config.base import Count, Decay, Section, current_name, has_field, with_current_names
from latentgen.train.config.data import Data, ImageData, Side
from latentgen.train.config.optimizer import Memory, Optimizer
from latentgen.train.config.tasks import (
    AutoencoderTask,
    FinetuneTask,
    FullMethod,
    LoRAMethod,
    PairedTask,
    TextToImageTask,
    UpscaleTask,
)

# YAML reads a bare `no` as false.
_NO = BeforeValidator(lambda value: "no" if value is False else value)
Precision = Annotated[Literal["no", "fp16", "bf16"], _NO]
Resume = Annotated[
    Literal["no", "latest", "auto"], BeforeValidator(lambda value: "latest" if value is True else value), _NO
]

Tracker = Literal["tensorboard", "wandb"]


class Validation(Section):
    """Images of fixed prompts, and the loss on held-out images; neither affects training.

    Every `every` steps `images_per_prompt` images of each of `prompts` are generated, with the seeds `seed`, `seed` + 1
    and so on, in `samples/` of the run's folder. `height`, `width` and `guidance_scale` are by default the model's.
    `at_start` validates before the first step, too.

    Image-conditioned models instead generate an output for each of the first `images` validation images; a row has the
    input, the output and the target. An inpainting model receives a random mask of each image, an instruction
    model the image before the edit, with the caption as the instruction.

    Every `loss_every` steps the loss is measured on the first `loss_images` images of `data`, or of the recipe's
    `validation_fraction`: the plain mean squared error at `timesteps` timesteps, the middles of as many equal parts of
    the schedule, with noise that depends only on `seed`, so that it can be compared between runs.
    """

    prompts: tuple[str, ...] = ()
    images: Annotated[int, Field(ge=0, le=64)] = 0
    negative_prompt: str = ""
    every: Count = 500
    at_start: bool = False
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    images_per_prompt: Annotated[int, Field(ge=1, le=64)] = 1
    num_inference_steps: Annotated[int, Field(ge=1, le=1000)] = 25
    guidance_scale: Annotated[float, Field(ge=0, le=1e6)] | None = None
    height: Side | None = None
    width: Side | None = None
    data: Data | None = None
    loss_every: Count = 500
    loss_images: Annotated[int, Field(ge=1, le=65536)] = 64
    timesteps: Annotated[int, Field(ge=1, le=1000)] = 4

    @model_validator(mode="after")
    def _prompts_are_text(self) -> Self:
        check_prompts((*self.prompts, self.negative_prompt))
        return self


class TrainConfig(Section):
    """One recipe.

    `init_from` is a folder in the diffusers layout whose weights training starts from (fine-tuning also accepts a
    single file, and without `init_from` starts from the embedded default model); `batch_size` is the number of samples
    in an optimizer step over all processes and accumulated parts; with `ema_decay` 0 there is no moving average;
    `compile` takes minutes before the first step and makes the others faster (on a CPU it needs a C++ compiler).

    `workers` processes for each training process prepare the batches ahead; the batches are the same to the bit.

    `resume` is `no` (a folder with a run is an error), `latest` or true (a folder without a run is an error), or `auto`
    (resume if there is a checkpoint, else begin: for jobs that restart automatically). `allow_changes` names the
    fields, or sections, in which the recipe of a resumed run may differ from its first one.

    `validation_fraction` of the images are held out of training for `validation`: the same ones in every run over as
    many images, and each with all of its repeats. `trackers` receive the metrics of `log.jsonl` and the images of
    `validation`.
    """

    output_dir: Path
    task: Annotated[
        AutoencoderTask | TextToImageTask | UpscaleTask | PairedTask | FinetuneTask,
        Field(discriminator="kind"),
    ]
    data: Data
    validation_fraction: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    init_from: Path | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    mixed_precision: Precision = "no"
    compile: bool = False
    batch_size: Annotated[int, Field(ge=1, le=65536)]
    gradient_accumulation_steps: Annotated[int, Field(ge=1, le=65536)] = 1
    max_steps: Count
    optimizer: Optimizer = Optimizer()
    memory: Memory = Memory()
    ema_decay: Decay = 0.0
    checkpoint_every: Count = 1000
    keep_checkpoints: Annotated[int, Field(ge=1, le=1000)] = 2
    log_every: Count = 50
    workers: Annotated[int, Field(ge=0, le=256)] = 0
    resume: Resume = "no"
    allow_changes: tuple[str, ...] = ()
    validation: Validation | None = None
    trackers: tuple[Tracker, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _accept_old_names(cls, fields: Any) -> Any:
        return with_current_names(fields) if isinstance(fields, dict) else fields

    @field_validator("allow_changes")
    @classmethod
    def _are_fields(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        names = tuple(map(current_name, names))
        if unknown := [name for name in names if not has_field(TrainConfig, name)]:
            raise ValueError(f"unknown field {', '.join(map(quote, unknown))}; nested fields have dots")
        return names

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        problems = [*self._step_problems(), *self._task_problems(), *self._validation_problems()]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _step_problems(self) -> Iterator[str]:
        optimizer, memory, parts = self.optimizer, self.memory, self.gradient_accumulation_steps
        if self.batch_size % parts:
            yield f"batch_size: {self.batch_size} is not a multiple of gradient_accumulation_steps {parts}"
        if optimizer.step_in_backward and parts > 1:
            yield f"optimizer.step_in_backward: set gradient_accumulation_steps to 1; it is {parts}"
        if memory.offload_optimizer and optimizer.name not in ("adamw", "adafactor"):
            yield f"memory.offload_optimizer: only for adamw and adafactor; optimizer.name is {optimizer.name}"
        if memory.offload_optimizer and optimizer.name == "adafactor" and optimizer.step_in_backward:
            yield "memory.offload_optimizer: adafactor with step_in_backward leaves nothing to offload; remove it"
        if self.takes_gradients is not None and self.mixed_precision == "fp16":
            yield f"{self.takes_gradients} does not work with fp16; set mixed_precision to bf16 or no"
        if optimizer.text_encoder_learning_rate is not None and not self._trains_text_encoder:
            yield "optimizer.text_encoder_learning_rate: set train_text_encoder to true, or remove it"
        if memory.ema_device == "cpu" and not self.ema_decay:
            yield "memory.ema_device: without ema_decay there is no moving average; set it, or remove ema_device"
        if self.compile and memory.gradient_checkpointing == "selective":
            yield "memory.gradient_checkpointing: selective is not for compile, which selects by itself; remove one"

    def _task_problems(self) -> Iterator[str]:
        task, no_weights = self.task, self.init_from is None
        if isinstance(task, AutoencoderTask) and not task.train_encoder and no_weights:
            yield "task.train_encoder: with false, init_from must name the folder of a trained encoder"
        if isinstance(task, TextToImageTask) and not task.train_text_encoder and no_weights:
            yield "task.train_text_encoder: with false, init_from must name the folder of a trained text encoder"
        if isinstance(task, TextToImageTask) and task.reinit_layers and no_weights:
            yield "task.reinit_layers: without init_from all layers are initialized at random; remove it"
        if isinstance(task, UpscaleTask) and isinstance(self.data, ImageData) and self.data.buckets:
            yield "data.buckets: task.kind upscale trains on square images; set it to false"

    def _validation_problems(self) -> Iterator[str]:
        validation, task = self.validation, self.task
        if validation is None:
            if self.validation_fraction:
                yield "validation_fraction: add `validation: {loss_every: 500}`, or remove it"
            return
        needs_image = isinstance(task, UpscaleTask | PairedTask)
        if validation.prompts and (needs_image or isinstance(task, AutoencoderTask)):
            yield f"validation.prompts: not for task.kind {task.kind}; remove them, and set validation.images"
        # For fine-tuning, the checkpoint determines whether the model takes images.
        if validation.images and not (needs_image or isinstance(task, FinetuneTask)):
            yield f"validation.images: models of task.kind {task.kind} take no input image; remove it"
        if validation.images and not self.measures:
            yield "validation.images: no validation images; set validation_fraction or validation.data"
        if validation.data is not None and validation.data.image_size != self.data.image_size:
            yield (
                f"validation.data.image_size: it is {validation.data.image_size}; it must equal data.image_size, "
                f"{self.data.image_size}"
            )
        if validation.data is not None and self.validation_fraction:
            yield "validation.data: validation_fraction also provides the validation images; remove one of them"
        if not validation.prompts and not self.measures:
            yield "validation: it has nothing to do; set prompts or data in it, or validation_fraction"

    @property
    def takes_gradients(self) -> str | None:
        """The field, if one is set, that frees or offloads each gradient within the backward pass."""
        if self.optimizer.step_in_backward:
            return "optimizer.step_in_backward"
        return "memory.offload_optimizer" if self.memory.offload_optimizer else None

    @property
    def _trains_text_encoder(self) -> bool:
        part = self.task.method if isinstance(self.task, FinetuneTask) else self.task
        return isinstance(part, FullMethod | LoRAMethod | TextToImageTask) and part.train_text_encoder

    @property
    def measures(self) -> bool:
        """Whether a validation loss is measured."""
        return self.validation is not None and (
            self.validation.data is not None or self.validation_fraction > 0
        )
