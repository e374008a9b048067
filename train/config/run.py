"""Training recipes: YAML files, validated before anything is loaded or built."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from latentgen.errors import ConfigError
from latentgen.files import quote
from latentgen.train.config.base import Count, Decay, Section, current_name, has_field, with_current_names
from latentgen.train.config.data import Data, FramedData
from latentgen.train.config.finetune import FinetuneTask, FullMethod, LoRAMethod
from latentgen.train.config.memory import Memory
from latentgen.train.config.optimizer import Optimizer
from latentgen.train.config.tasks import AutoencoderTask, PairedTask, TextToImageTask, UpscaleTask
from latentgen.train.config.validation import Validation

# YAML reads a bare `no` as false.
_NO = BeforeValidator(lambda value: "no" if value is False else value)
Precision = Annotated[Literal["no", "fp16", "bf16"], _NO]
Resume = Annotated[
    Literal["no", "latest", "auto"], BeforeValidator(lambda value: "latest" if value is True else value), _NO
]

Tracker = Literal["tensorboard", "wandb"]


class TrainConfig(Section):
    """One recipe: what is learnt, from what, and how the run goes.

    `init_from` is a folder in the diffusers layout whose weights training starts from (fine-tuning takes a single
    file, too, and without it the embedded default model); `batch_size` counts the samples
    of an optimiser step over all processes and accumulated parts; `ema_decay` 0 keeps no moving average; `compile`
    takes minutes before the first step and makes the others faster (on a CPU it needs a C++ compiler).

    `workers` processes beside each training process prepare the batches ahead, the same ones bit for bit as with 0.

    `resume` is `no` (a folder that holds a run is an error), `latest` (a folder that holds none is an error; true says
    the same) or `auto` (go on if there is something to go on from, else begin: for jobs that are started again by
    themselves). `allow_changes` names the fields, or sections, in which the recipe of a resumed run may differ from
    what it began with.

    `validation_fraction` of the images are held out of training for `validation`: the same ones in every run over a set
    of as many images, and each with all of its repeats. `trackers` receive the metrics of `log.jsonl` and the images of
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
    def _allow_old_names(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(current_name, names))

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.batch_size % self.gradient_accumulation_steps:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of gradient_accumulation_steps "
                f"{self.gradient_accumulation_steps}"
            )
        if self.optimizer.step_in_backward and self.gradient_accumulation_steps > 1:
            raise ValueError(
                "optimizer.step_in_backward: each gradient is used up at once, so none can be accumulated; set "
                f"gradient_accumulation_steps to 1 (it is {self.gradient_accumulation_steps}) and lower batch_size"
            )
        if self.memory.offload_optimizer and self.optimizer.name not in ("adamw", "adafactor"):
            raise ValueError(
                f"memory.offload_optimizer is for adamw and adafactor; optimizer.name is {self.optimizer.name}"
            )
        if (
            self.memory.offload_optimizer
            and self.optimizer.name == "adafactor"
            and self.optimizer.step_in_backward
        ):
            raise ValueError(
                "memory.offload_optimizer: with adafactor and step_in_backward nothing is left to be sent away; leave "
                "it out"
            )
        if (taking := self.takes_gradients) is not None and self.mixed_precision == "fp16":
            raise ValueError(
                f"{taking}: the loss scaling of fp16 must see all gradients before the step; use mixed_precision "
                "bf16 or no"
            )
        if self.optimizer.text_encoder_learning_rate is not None and not self._text_encoder_learns:
            raise ValueError(
                "optimizer.text_encoder_learning_rate: no text encoder learns beside a UNet here; set "
                "train_text_encoder to true where the task has it, or leave the rate out"
            )
        if self.validation is not None:
            self._check_validation(self.validation)
        elif self.validation_fraction:
            raise ValueError(
                "validation_fraction is set but no validation is configured; add `validation: {loss_every: 500}`, or "
                "remove validation_fraction"
            )
        if self.memory.ema_device == "cpu" and not self.ema_decay:
            raise ValueError(
                "memory.ema_device: there is no moving average to keep, as ema_decay is 0; leave it out, or set that"
            )
        if self.compile and self.memory.gradient_checkpointing == "selective":
            raise ValueError(
                "memory.gradient_checkpointing selective: compile sees by itself what is cheaper to compute once more; "
                "leave one of them out"
            )
        if unknown := [name for name in self.allow_changes if not has_field(TrainConfig, name)]:
            raise ValueError(
                f"allow_changes: {', '.join(map(quote, unknown))} is no field of a recipe; nested ones have dots, "
                "as in optimizer.learning_rate"
            )
        if isinstance(self.task, AutoencoderTask) and not self.task.train_encoder and self.init_from is None:
            raise ValueError(
                "task.train_encoder is false, so init_from must name the folder of a trained encoder"
            )
        if isinstance(self.task, TextToImageTask) and self.init_from is None:
            if not self.task.train_text_encoder:
                raise ValueError(
                    "task.train_text_encoder is false, so init_from must name the folder of a trained text encoder"
                )
            if self.task.reinit_layers:
                raise ValueError(
                    "task.reinit_layers: without init_from every layer begins at random; leave it out"
                )
        if isinstance(self.task, UpscaleTask) and isinstance(self.data, FramedData) and self.data.buckets:
            raise ValueError("task upscale learns from squares; set data.buckets to false")
        return self

    def _check_validation(self, validation: Validation) -> None:
        shows_images = isinstance(self.task, UpscaleTask | PairedTask)
        if validation.prompts and (shows_images or isinstance(self.task, AutoencoderTask)):
            raise ValueError(
                f"validation.prompts: a model of task.kind {self.task.kind} draws nothing from a prompt alone; leave "
                "them out, and give it validation_fraction or validation.data, and validation.images"
            )
        # Of a finished model the checkpoint says what it makes images of; see Objective.remakes.
        if validation.images and not (shows_images or isinstance(self.task, FinetuneTask)):
            raise ValueError(
                f"validation.images: a model of task.kind {self.task.kind} makes no image out of another; leave it out"
            )
        if validation.images and not self.measures:
            raise ValueError(
                "validation.images: there are none to show; set validation_fraction, or validation.data"
            )
        if validation.data is not None and validation.data.image_size != self.data.image_size:
            raise ValueError(
                f"validation.data.image_size is {validation.data.image_size}; it must be that of data, "
                f"{self.data.image_size}"
            )
        if validation.data is not None and self.validation_fraction:
            raise ValueError(
                "validation.data and validation_fraction both name the images to measure on; keep one of them"
            )
        if not (validation.prompts or validation.data or self.validation_fraction):
            raise ValueError(
                "validation has nothing to do: give it prompts, or data; or set validation_fraction"
            )

    @property
    def takes_gradients(self) -> str | None:
        """The field, if one is set, by which each gradient is used up or sent away within the backward pass."""
        if self.optimizer.step_in_backward:
            return "optimizer.step_in_backward"
        return "memory.offload_optimizer" if self.memory.offload_optimizer else None

    @property
    def _text_encoder_learns(self) -> bool:
        part = self.task.method if isinstance(self.task, FinetuneTask) else self.task
        return isinstance(part, FullMethod | LoRAMethod | TextToImageTask) and part.train_text_encoder

    @property
    def measures(self) -> bool:
        """Whether a validation loss is measured."""
        return self.validation is not None and (
            self.validation.data is not None or self.validation_fraction > 0
        )


# Fields in which a resumed run may differ. max_steps alone changes what is computed: it moves the end of the
# learning rate's schedule.
FREE_FIELDS = frozenset(
    {
        "output_dir",
        "max_steps",
        "checkpoint_every",
        "keep_checkpoints",
        "log_every",
        "workers",
        "resume",
        "allow_changes",
        "validation",
        "trackers",
        "task.cache_dir",
        "data.index_dir",
        "memory.gradient_checkpointing",
        "memory.ema_device",
        "memory.offload_optimizer",
        "memory.planner",
    }
)
# And those in which it may not even if allow_changes names them: the checkpoint would mean nothing.
FIXED_FIELDS = frozenset(
    {
        "task.kind",
        "task.method.kind",
        "task.method.rank",
        "task.method.targets",
        "task.method.text_targets",
        "task.method.train_text_encoder",
        "task.method.num_vectors",
        "task.convert_to",
        "task.train_encoder",
        "task.train_text_encoder",
        "optimizer.name",
    }
)
# These may change, but not from 0 or to 0, where there is nothing of their kind.
SWITCHING_FIELDS = frozenset({"ema_decay"})


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a recipe.

    Args:
        path: a YAML file.
        overrides: `key=value` assignments, with dots for nested keys; the value is read as YAML.

    Raises:
        ConfigError: the file cannot be read, or a field is unknown, missing, of a wrong type or out of bounds.
    """
    try:
        fields = _read_yaml(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"the recipe {path} cannot be read: {error}") from None
    if not isinstance(fields, dict):
        raise ConfigError(
            f"the recipe {path} must be a mapping of fields to values; see configs/train/ for examples"
        )
    fields = with_current_names(fields)
    for override in overrides:
        _assign(fields, override)
    try:
        return TrainConfig.model_validate(fields)
    except ValidationError as error:
        raise ConfigError(f"the recipe {path} cannot be used: {in_one_line(error)}") from None


class _Loader(yaml.SafeLoader):
    """YAML in which no key may stand twice, where other loaders take the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            line = key.start_mark.line + 1
            if key.value in lines:
                raise yaml.YAMLError(
                    f"line {line}: {key.value} stands in line {lines[key.value]} already; keep one of them"
                )
            lines[key.value] = line
        return node


def _read_yaml(text: str) -> Any:
    return yaml.load(text, _Loader)


def in_one_line(error: ValidationError) -> str:
    """Every problem of a recipe, with the field that it is about."""
    problems = []
    for detail in error.errors(include_url=False):
        field, message = ".".join(map(str, detail["loc"])), _message(detail)
        problems.append(f"{field}: {message}" if field else message)
    return "; ".join(problems)


def _message(detail: ErrorDetails) -> str:
    """What is wrong with a field; where a section or a list was due, how it is written."""
    kind, found = detail["type"], detail["input"]
    if kind == "value_error":  # one of ours, without pydantic's "Value error, "
        return str(detail.get("ctx", {}).get("error", detail["msg"]))
    if kind == "model_attributes_type":
        return (
            f"it must be a section with a kind, as in {{kind: {found if isinstance(found, str) else '...'}}}"
        )
    if kind == "model_type":
        return f"it must be a section, with its fields below it; found {quote(found)}"
    if kind in ("tuple_type", "list_type"):
        return f"it must be a list, as in [{found if isinstance(found, str) else '...'}]"
    return detail["msg"]


def _assign(fields: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set takes key=value, found {override!r}")
    *parents, last = current_name(key).split(".")
    for parent in parents:
        fields = fields.setdefault(parent, {})
        if not isinstance(fields, dict):
            raise ConfigError(f"--set {override!r}: {parent} is not a section of the recipe")
    try:
        fields[last] = _read_yaml(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override!r}: the value is not YAML: {error}") from None
