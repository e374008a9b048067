"""The sections of a recipe that say how a finished model is taught something new."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from latentgen.prompts import check_prompts
from latentgen.train.config.base import Positive, Rate, Section
from latentgen.train.config.tasks import DiffusionTask

LayerNames = Annotated[tuple[Annotated[str, Field(min_length=1, max_length=200)], ...], Field(min_length=1)]


class FullMethod(Section):
    """Train all weights of the UNet, and those of the text encoders on request; saves the whole model."""

    kind: Literal["full"]
    train_text_encoder: bool = False


class LoRAMethod(Section):
    """Train factors of `rank` beside frozen layers (arXiv:2106.09685); saves them as diffusers and as kohya do.

    `targets` are the ends of the paths of the UNet's layers: `ff.net.0.proj` and `ff.net.2` are those of feed-forward
    layers, `conv1` and `conv2` convolutions. `text_targets` are likewise those of the text encoders, which learn with
    `train_text_encoder`. What the factors make counts `alpha` / `rank` times; `alpha` is by default the rank.
    `init_lora` names a LoRA file, of the same rank and layers, to go on from.
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
    """Learn `num_vectors` vectors for a new `token`, and nothing else (arXiv:2208.01618); saves them alone.

    The vectors begin as those of the words of `initializer`, and the captions of the training set hold the token.
    """

    kind: Literal["textual_inversion"]
    token: Annotated[str, Field(min_length=1, max_length=200)]
    initializer: Annotated[str, Field(min_length=1, max_length=200)]
    num_vectors: Annotated[int, Field(ge=1, le=1024)] = 1


Method = FullMethod | LoRAMethod | TextualInversionMethod


class Prior(Section):
    """Prior preservation (DreamBooth, arXiv:2208.12242, section 3.2): the rest of a class is not to be forgotten.

    The model that training starts from draws `images` images of `prompt` before the first step; of several prompts each
    in turn. Each step then sees as many of them as of the training set, and their loss counts `weight` times.

    `path` is a folder of the user's own images of the class, and its sub-folders: all of them are used, and the model
    draws what they are fewer than `images`. They may have captions as in FolderData; `prompt` is that of the others.
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
            raise ValueError(
                f"prompt: with path it is the caption of all images that have none of their own, and must be one; "
                f"found {len(self.prompt)}. Write them into text files beside the images, or leave path out"
            )
        return self

    def prompt_of(self, number: int) -> str:
        """What image `number` is to show."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[number % len(self.prompt)]


class FinetuneTask(DiffusionTask):
    """Teach a finished model something new: `init_from`, or the embedded default model.

    Networks, schedule and prediction type are those of the checkpoint, which also tells whether it inpaints or follows
    instructions; `variant` names one of several sets of its weights, such as fp16, and `prediction_type` what a single
    file of Stable Diffusion 2 does not say. `method` says what is trained, `prior` what else is not to change.

    `convert_to` makes a model of inpainting, or one that follows instructions, out of one of text to image: its UNet
    gets the input channels that are due, which count for nothing at first (arXiv:2211.09800, section 3.2).

    `conditioning_dropout` is for models that follow instructions, in place of `caption_dropout`: how often the
    instruction alone, the image alone, and both are left out (arXiv:2211.09800, section 3.2.1).

    The other fields are those of DiffusionTask; `guidance_scale` is written with a whole model alone.
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
    def _belong_together(self) -> Self:
        if self.guidance_scale is not None and self.method.kind != "full":
            raise ValueError(
                f"guidance_scale belongs to a whole model, and method {self.method.kind} saves none; leave it out"
            )
        if self.convert_to is not None and self.method.kind != "full":
            raise ValueError(
                f"convert_to: the new input channels can only be learnt with method full, not {self.method.kind}"
            )
        if self.prior is not None and self.method.kind == "textual_inversion":
            raise ValueError(
                "prior: textual_inversion changes no weight of the model, so no prior is in danger; leave it out"
            )
        return self
