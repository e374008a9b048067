"""Training recipes: YAML files, validated before anything is loaded or built."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from latentgen.errors import ConfigError
from latentgen.train.config.base import Count, Decay, Section
from latentgen.train.config.data import EmojiData, FolderData
from latentgen.train.config.finetune import FinetuneTask
from latentgen.train.config.optimizer import Optimizer
from latentgen.train.config.tasks import AutoencoderTask, PairedTask, TextToImageTask, UpscaleTask

# YAML reads a bare `no` as false.
Precision = Annotated[Literal["no", "fp16", "bf16"], BeforeValidator(lambda v: "no" if v is False else v)]


class TrainConfig(Section):
    """One recipe: what is learnt, from what, and how the run goes.

    `init_from` is a folder in the diffusers layout whose weights training starts from (fine-tuning takes a single
    file, too, and without it the embedded default model); `batch_size` counts the samples
    of an optimiser step over all processes and accumulated parts; `ema_decay` 0 keeps no moving average; `compile`
    takes minutes before the first step and makes the others faster (on a CPU it needs a C++ compiler).
    """

    output_dir: Path
    task: Annotated[
        AutoencoderTask | TextToImageTask | UpscaleTask | PairedTask | FinetuneTask,
        Field(discriminator="kind"),
    ]
    data: Annotated[EmojiData | FolderData, Field(discriminator="kind")]
    init_from: Path | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    mixed_precision: Precision = "no"
    compile: bool = False
    batch_size: Annotated[int, Field(ge=1, le=65536)]
    gradient_accumulation_steps: Annotated[int, Field(ge=1, le=65536)] = 1
    max_steps: Count
    optimizer: Optimizer = Optimizer()
    ema_decay: Decay = 0.0
    checkpoint_every: Count = 1000
    keep_checkpoints: Annotated[int, Field(ge=1, le=1000)] = 2
    log_every: Count = 50
    resume: bool = False

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.batch_size % self.gradient_accumulation_steps:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of gradient_accumulation_steps "
                f"{self.gradient_accumulation_steps}"
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
            if self.task.fresh_layers:
                raise ValueError(
                    "task.fresh_layers: without init_from every layer begins at random; leave it out"
                )
        return self


# Fields in which a resumed run may differ. max_steps alone changes what is computed: it moves the linear end.
FREE_FIELDS = frozenset(
    {"output_dir", "max_steps", "checkpoint_every", "keep_checkpoints", "log_every", "resume"}
)


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a recipe.

    Args:
        path: a YAML file.
        overrides: `key=value` assignments, with dots for nested keys; the value is read as YAML.

    Raises:
        ConfigError: the file cannot be read, or a field is unknown, missing, of a wrong type or out of bounds.
    """
    try:
        fields = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"the recipe {path} cannot be read: {error}") from None
    if not isinstance(fields, dict):
        raise ConfigError(
            f"the recipe {path} must be a mapping of fields to values; see configs/train/ for examples"
        )
    for override in overrides:
        _assign(fields, override)
    try:
        return TrainConfig.model_validate(fields)
    except ValidationError as error:
        raise ConfigError(f"the recipe {path} cannot be used: {in_one_line(error)}") from None


def in_one_line(error: ValidationError) -> str:
    """Every problem of a recipe, with the field that it is about."""
    return "; ".join(
        f"{'.'.join(str(part) for part in detail['loc']) or 'recipe'}: {detail['msg']}"
        for detail in error.errors(include_url=False)
    )


def _assign(fields: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set takes key=value, found {override!r}")
    *parents, last = key.split(".")
    for parent in parents:
        fields = fields.setdefault(parent, {})
        if not isinstance(fields, dict):
            raise ConfigError(f"--set {override!r}: {parent} is not a section of the recipe")
    try:
        fields[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override!r}: the value is not YAML: {error}") from None
