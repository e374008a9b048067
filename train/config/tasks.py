"""The `task` section of a recipe: the networks to train, the method and the loss."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from latentgen.deprecated import warn_renamed
from latentgen.prompts import check_prompts
from latentgen.train.config.base import Positive, Rate, Section

ErrorKind = Literal["l2", "huber", "smooth_l1"]


class MinSNR(Section):
    """Weights clamped at the signal-to-noise ratio `gamma` (arXiv:2303.09556)."""

    kind: Literal["min_snr"]
    gamma: Positive = 5.0


class Debiased(Section):
    """Weights that remove the bias of the predicted x0 (arXiv:2310.08442)."""

    kind: Literal["debiased"]


class P2(Section):
    """Weights that favor the noise levels at which content emerges (arXiv:2204.00227)."""

    kind: Literal["p2"]
    gamma: Positive = 1.0
    k: Positive = 1.0


class PyramidNoise(Section):
    """Additional noise of lower resolutions, each `discount` times as strong as the previous one."""

    iterations: Annotated[int, Field(ge=1, le=16)] = 6
    discount: Rate = 0.4


Weighting = Annotated[
    Annotated[MinSNR | Debiased | P2, Field(discriminator="kind")] | None,
    BeforeValidator(lambda value: None if value == "none" else value),
]


class LatentLoss(Section):
    """The loss of the diffusion tasks; by default the plain mean squared error.

    `kind` is the error that is averaged: squared, or growing more slowly beyond `huber_c` (arXiv:2403.16728).
    `weighting` weights the noise levels. With `zero_terminal_snr` the schedule is rescaled so that its last timestep is
    pure noise (arXiv:2305.08891), and the trained model is sampled with that schedule.

    `offset_noise` shifts the noise of each channel by a constant (strengths of 0.03 to 0.1 are usual), `pyramid_noise`
    adds coarser noise: both let a model learn brightness and large shapes. `input_perturbation` adds a little more
    noise to the UNet's input than its timestep says (arXiv:2301.11706; 0.1 is usual). `masked` weights the error by the
    images' masks.
    """

    kind: ErrorKind = "l2"
    huber_c: Positive = 0.1
    weighting: Weighting = None
    zero_terminal_snr: bool = False
    offset_noise: Rate = 0.0
    pyramid_noise: PyramidNoise | None = None
    input_perturbation: Rate = 0.0
    masked: bool = False

    @model_validator(mode="after")
    def _uses_huber_c(self) -> Self:
        if self.kind == "l2" and self.huber_c != LatentLoss.model_fields["huber_c"].default:
            raise ValueError("huber_c is for kind huber and smooth_l1; the kind is l2: leave it out")
        return self


Degradation = Literal["colorization", "uncropping", "jpeg", "inpainting"]


def _american(degradation: object) -> object:
    if degradation != "colourisation":
        return degradation
    warn_renamed("the degradation colourisation", "colorization")
    return "colorization"


class AutoencoderTask(Section):
    """Train a KL autoencoder: reconstruction, edges and a slight pull of the latents towards the standard normal.

    `vae` is the content of a diffusers `vae/config.json`. Without `train_encoder` only the decoder is trained, and the
    latents are those of `init_from`.
    """

    kind: Literal["autoencoder"]
    vae: dict[str, Any]
    edge_weight: Annotated[float, Field(ge=0, le=100)] = 0.5
    kl_weight: Annotated[float, Field(ge=0, le=1)] = 1e-6
    train_encoder: bool = True


class DiffusionTask(Section):
    """The common fields of all diffusion tasks in the latents of a pretrained autoencoder.

    `views_per_image` random views of every item are encoded once, before training, and cached in memory or, with
    `cache_dir`, in a folder that all runs may share; 0 draws and encodes new ones in every step. Captions are also
    encoded once if the text encoder is not trained, unless they are shuffled, or too many for memory without
    `cache_dir`. If neither crops nor mirroring nor the task is random, only one view of each item is encoded.

    A `timestep_shift` above 1 spends more samples on the noisier timesteps; `guidance_scale` is the default of the
    trained model; `save_half` writes it in float16.
    """

    caption_dropout: Rate = 0.1
    views_per_image: Annotated[int, Field(ge=0, le=4096)] = 16
    cache_dir: Path | None = None
    timestep_shift: Positive = 1.0
    loss: LatentLoss = LatentLoss()
    guidance_scale: Annotated[float, Field(ge=0, le=1e6)] | None = None
    save_half: bool = False


class LatentTask(DiffusionTask):
    """A task with its own networks: `unet` and `scheduler` are the contents of the diffusers configurations.

    The other fields are those of DiffusionTask.
    """

    unet: dict[str, Any]
    scheduler: dict[str, Any]


class TextToImageTask(LatentTask):
    """Train a UNet and its text encoder jointly in the latents of a pretrained autoencoder, or in pixels.

    `vae` is a folder with that autoencoder, or null for pixels; `text_encoder` is the content of a configuration.
    Without `train_text_encoder` the text encoder is that of `init_from`; `reinit_layers` of the UNet, such as
    `conv_in`, are initialized at random even with `init_from`. The other fields are those of LatentTask.
    """

    kind: Literal["text_to_image"]
    vae: Path | None
    text_encoder: dict[str, Any]
    train_text_encoder: bool = True
    reinit_layers: tuple[str, ...] = ()


class UpscaleTask(LatentTask):
    """Train a UNet to upscale low-resolution images, in latents or on pixels.

    The low-resolution image is the target, resampled with a random kernel to `image_size` / scale. The scale is the
    autoencoder's factor / r, where `unet.in_channels` is the channels of the latents + 3 * r * r. Without an
    autoencoder (`vae: null`) the UNet, of 6 channels, works on pixels and receives the image enlarged by the scale,
    which is `enlargement`. It also receives the noise level, at most `max_noise_level`, to which `low_res_scheduler`
    noises its input image.

    `text_encoder` is a folder with a frozen text encoder and its tokenizer. The other fields are those of LatentTask.
    """

    kind: Literal["upscale"]
    vae: Path | None
    text_encoder: Path
    low_res_scheduler: dict[str, Any]
    max_noise_level: Annotated[int, Field(ge=0, le=10**5)] = 350
    enlargement: Annotated[int, Field(ge=1, le=16)] = 1


class PairedTask(LatentTask):
    """Train a UNet to restore degraded images, in latents or, with `vae: null`, on pixels.

    For `degradation` see latentgen.train.objectives.degradation. `unet.in_channels` is twice the channels of the
    latents. `init_from` may also be a text-to-image model, whose UNet has half of these channels: the weights of the
    others are initialized with zeros.

    `text_encoder` is a folder with a frozen text encoder and its tokenizer. The other fields are those of LatentTask.
    """

    kind: Literal["paired"]
    vae: Path | None
    text_encoder: Path
    degradation: Annotated[Degradation, BeforeValidator(_american)]


LayerNames = Annotated[tuple[Annotated[str, Field(min_length=1, max_length=200)], ...], Field(min_length=1)]


class FullMethod(Section):
    """Train all weights of the UNet, and those of the text encoders on request; saves the whole model."""

    kind: Literal["full"]
    train_text_encoder: bool = False


class LoRAMethod(Section):
    """Train factors of `rank` next to frozen layers (arXiv:2106.09685); saves them in diffusers' and kohya's formats.

    `targets` are suffixes of the paths of the UNet's layers: `ff.net.0.proj` and `ff.net.2` are those of feed-forward
    layers, `conv1` and `conv2` convolutions. `text_targets` are those of the text encoders, which are trained with
    `train_text_encoder`. The output of the factors is scaled by `alpha` / `rank`; `alpha` is by default the rank.
    `init_lora` is a LoRA file of the same rank and layers that training starts from.
    """

    kind: Literal["lora"]
    rank: Annotated[int, Field(ge=1, le=4096)] = 16
    alpha: Positive | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: LayerNames = ("to_q", "to_k", "to_v", "to_out.0")
    train_text_encoder: bool = False
    text_targets: LayerNames = ("q_proj", "k_proj", "v_proj", "out_proj")
    init_lora: Path | None = None


class TextualInversionMethod(Section):
    """Train only `num_vectors` vectors for a new `token` (arXiv:2208.01618), and save them.

    They are initialized from the words of `initializer`; the captions of the training set contain the token.
    """

    kind: Literal["textual_inversion"]
    token: Annotated[str, Field(min_length=1, max_length=200)]
    initializer: Annotated[str, Field(min_length=1, max_length=200)]
    num_vectors: Annotated[int, Field(ge=1, le=1024)] = 1


Method = FullMethod | LoRAMethod | TextualInversionMethod


class Prior(Section):
    """Prior preservation (DreamBooth, arXiv:2208.12242, section 3.2): the model should not forget the rest of a class.

    Before the first step the initial model generates `images` images of `prompt`, or of several prompts in turn. Each
    step trains on as many class images as training images, with the loss of the class images multiplied by `weight`.

    `path` is a folder of the user's own images of the class, with its sub-folders: all of them are used, and the model
    generates the rest of `images`. They may have captions as in FolderData; `prompt` is that of the others.
    """

    prompt: str | Annotated[tuple[str, ...], Field(min_length=1)]
    path: Path | None = None
    images: Annotated[int, Field(ge=1, le=100_000)] = 100
    weight: Positive = 1.0

    @field_validator("prompt")
    @classmethod
    def _is_text(cls, prompt: str | tuple[str, ...]) -> str | tuple[str, ...]:
        check_prompts((prompt,) if isinstance(prompt, str) else prompt)
        return prompt

    @model_validator(mode="after")
    def _has_one_caption(self) -> Self:
        if self.path is not None and not isinstance(self.prompt, str):
            raise ValueError(f"prompt: with path it must be one caption for all; found {len(self.prompt)}")
        return self

    def prompt_of(self, number: int) -> str:
        """The prompt of image `number`."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[number % len(self.prompt)]


class FinetuneTask(DiffusionTask):
    """Fine-tune a pretrained model: `init_from`, or the embedded default model.

    Networks, schedule and prediction type are those of the checkpoint, which also determines whether it inpaints or
    follows instructions; `variant` names one of several sets of its weights, such as fp16, and `prediction_type` is for
    a single file of Stable Diffusion 2, which does not record it.

    `convert_to` turns a text-to-image model into one for inpainting or instructions: its UNet gets additional input
    channels, whose weights are initialized with zeros (arXiv:2211.09800, section 3.2).

    `conditioning_dropout` replaces `caption_dropout` for models that follow instructions: how often only the
    instruction, only the image, and both are dropped (arXiv:2211.09800, section 3.2.1).

    The other fields are those of DiffusionTask; only whole models save a `guidance_scale`.
    """

    kind: Literal["finetune"]
    method: Annotated[Method, Field(discriminator="kind")]
    prior: Prior | None = None
    convert_to: Literal["inpainting", "instruct"] | None = None
    caption_dropout: Rate = 0.0
    conditioning_dropout: Annotated[float, Field(ge=0, le=1 / 3)] = 0.05
    variant: str | None = None
    prediction_type: Literal["epsilon", "v_prediction"] | None = None

    @model_validator(mode="after")
    def _fits_method(self) -> Self:
        kind = self.method.kind
        for field, value in (("guidance_scale", self.guidance_scale), ("convert_to", self.convert_to)):
            if value is not None and kind != "full":
                raise ValueError(f"{field} needs method full, which saves a whole model; found {kind}")
        if self.prior is not None and kind == "textual_inversion":
            raise ValueError("prior: textual_inversion does not change the model's weights; leave it out")
        return self
