"""Training recipes: YAML files, validated before anything is loaded or built."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from latentgen.errors import ConfigError

Rate = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0, le=1e6)]
Count = Annotated[int, Field(ge=1, le=2**40)]
Degradation = Literal["colourisation", "uncropping", "jpeg", "inpainting"]
# YAML reads a bare `no` as false.
Precision = Annotated[Literal["no", "fp16", "bf16"], BeforeValidator(lambda v: "no" if v is False else v)]


class Section(BaseModel):
    """A part of a recipe: unknown keys fail."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class EmojiData(Section):
    """The rendered emoji of Debian's fonts-noto-color-emoji.

    `held_out` of them, evenly chosen, are kept out of training, for benchmarks to measure on.
    """

    kind: Literal["emoji"]
    image_size: Annotated[int, Field(ge=8, le=128)] = 64
    held_out: Annotated[int, Field(ge=0, le=1000)] = 0


class FolderData(Section):
    """A folder of images, with captions in `metadata.jsonl` (`file_name`, `text`) or same-stem `.txt` files.

    Images that cannot be read are an error before training begins, or left out with a warning (`skip`).
    """

    kind: Literal["imagefolder"]
    path: Path
    image_size: Annotated[int, Field(ge=8, le=4096)]
    on_bad_image: Literal["error", "skip"] = "error"


class AutoencoderTask(Section):
    """Train a KL autoencoder: reconstruction, edges and a slight pull of the latents towards the standard normal.

    `vae` is the content of a diffusers `vae/config.json`. Without `train_encoder` the decoder alone learns, and the
    latents stay those of `init_from`.
    """

    kind: Literal["autoencoder"]
    vae: dict[str, Any]
    edge_weight: Annotated[float, Field(ge=0, le=100)] = 0.5
    kl_weight: Annotated[float, Field(ge=0, le=1)] = 1e-6
    train_encoder: bool = True


class LatentTask(Section):
    """What the tasks of diffusion in the latents of a finished autoencoder have in common.

    `unet` and `scheduler` are the contents of the diffusers configurations. `cached_views` random views of every item
    are encoded once, before training; a `timestep_shift` above 1 spends more samples on the noisier timesteps;
    `guidance_scale` is what the finished model is guided with where a call names none; `save_half` writes it in
    float16.
    """

    unet: dict[str, Any]
    scheduler: dict[str, Any]
    caption_dropout: Rate = 0.1
    cached_views: Annotated[int, Field(ge=1, le=4096)] = 16
    timestep_shift: Positive = 1.0
    guidance_scale: Annotated[float, Field(ge=0, le=1e6)] | None = None
    save_half: bool = False


class TextToImageTask(LatentTask):
    """Train a UNet and its text encoder jointly in the latents of a finished autoencoder, or in pixels.

    `vae` is a folder with that autoencoder, or null for pixels; `text_encoder` is the content of a configuration.
    Without `train_text_encoder` the text encoder stays that of `init_from`; `fresh_layers` of the UNet, such as
    `conv_in`, begin at random all the same. The other fields are those of LatentTask.
    """

    kind: Literal["text_to_image"]
    vae: Path | None
    text_encoder: dict[str, Any]
    train_text_encoder: bool = True
    fresh_layers: tuple[str, ...] = ()


class UpscaleTask(LatentTask):
    """Train a UNet to draw images that it is shown in low resolution, in the latents of a finished autoencoder.

    The low-resolution image is the true one, resampled with a random kernel to `image_size` / scale. The scale follows
    from `unet.in_channels`, which is the channels of the latents and 3 * r * r: it is the autoencoder's factor / r.
    The UNet is told the level, at most `max_noise_level`, to which `low_res_scheduler` noises what it is shown.

    `text_encoder` is a folder whose text encoder and tokenizer are used as they are. The other fields are those of
    LatentTask.
    """

    kind: Literal["upscale"]
    vae: Path
    text_encoder: Path
    low_res_scheduler: dict[str, Any]
    max_noise_level: Annotated[int, Field(ge=0, le=10**5)] = 350


class PairedTask(LatentTask):
    """Train a UNet to undo what was done to the images that it is shown, in the latents of a finished autoencoder.

    `degradation` is what is done to them: see latentgen.train.degradation. `unet.in_channels` is twice the channels of
    the latents. With `init_from` the run begins as that model, which may be one of text to image, whose UNet has half
    of these channels: the others count for nothing at first.

    `text_encoder` is a folder whose text encoder and tokenizer are used as they are. The other fields are those of
    LatentTask.
    """

    kind: Literal["paired"]
    vae: Path
    text_encoder: Path
    degradation: Degradation


class Optimizer(Section):
    """The optimiser and its learning rate: a linear warm-up, a plateau, and a linear end.

    `decay_fraction` is the share of the run, at its end, in which the rate falls to zero. `betas` are AdamW's; muon
    uses them for what is no weight matrix.
    """

    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: Positive = 1e-4
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    weight_decay: Rate = 0.01
    warmup_steps: Annotated[int, Field(ge=0, le=10**9)] = 100
    decay_fraction: Rate = 0.0
    max_grad_norm: Positive = 1.0

    def rate_at(self, step: int, max_steps: int) -> float:
        """The learning rate of step `step`, the first of which is 0."""
        warmup = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        left = (max_steps - step) / max_steps
        decay = min(1.0, left / self.decay_fraction) if self.decay_fraction else 1.0
        return self.learning_rate * min(warmup, decay)


class TrainConfig(Section):
    """One recipe: what is learnt, from what, and how the run goes.

    `init_from` is a folder in the diffusers layout whose weights training starts from; `batch_size` counts the samples
    of an optimiser step over all processes and accumulated parts; `ema_decay` 0 keeps no moving average; `compile`
    takes minutes before the first step and makes the others faster (on a CPU it needs a C++ compiler).
    """

    output_dir: Path
    task: Annotated[AutoencoderTask | TextToImageTask | UpscaleTask | PairedTask, Field(discriminator="kind")]
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
