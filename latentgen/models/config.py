"""The frozen, strictly validated configurations that the stages are built from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from latentgen.errors import ConfigError

Channels = Annotated[int, Field(ge=1, le=8192)]
Width = Annotated[int, Field(ge=1, le=16384)]
Count = Annotated[int, Field(ge=1, le=1024)]
TokenId = Annotated[int, Field(ge=0, lt=10**7)]
# Ten times the largest in use (Stable Diffusion's, 8.4e7, and OpenCLIP bigG, 7e8): more is a mistake or an attack.
_MAX_VAE_PARAMETERS = 10**9
_MAX_TEXT_PARAMETERS = 7 * 10**9
# What the weights of frozen layers may be stored in; see latentgen.models.quantized_weights.
StorageDtype = Literal["fp32", "bf16", "fp16", "fp8", "int8"]


class StageConfig(BaseModel):
    """A stage's `config.json`, with the field names of the JSON; unknown fields and wrong types are refused.

    Keys with an underscore (`_class_name`, `_diffusers_version`, ...) are metadata of the file and ignored.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    diffusers_class: ClassVar[str]

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """Validate the content of a `config.json`.

        Raises:
            ConfigError: naming every field that is unknown, of a wrong type or out of bounds.
        """
        known = {name: _as_tuples(value) for name, value in fields.items() if not name.startswith("_")}
        try:
            return cls(**known)
        except ValidationError as error:
            raise ConfigError(_describe(cls.diffusers_class, error)) from None

    def to_json(self) -> dict[str, Any]:
        """The content of a `config.json` that diffusers reads as well."""
        return {"_class_name": self.diffusers_class, **self.model_dump(mode="json")}


def _as_tuples(value: Any) -> Any:
    """JSON has only lists; the configurations hold tuples, so that they are hashable."""
    return tuple(_as_tuples(item) for item in value) if isinstance(value, list) else value


def _describe(name: str, error: ValidationError) -> str:
    problems = []
    for detail in error.errors(include_url=False):
        field = ".".join(str(part) for part in detail["loc"])
        if detail["type"] == "extra_forbidden":
            problems.append(f"{field}: unknown field")
        else:
            found = repr(detail["input"])
            found = found if len(found) <= 80 else found[:77] + "..."
            problems.append(f"{field}: {detail['msg']} (found {found})" if field else detail["msg"])
    return f"the configuration of {name} cannot be used: " + "; ".join(problems)


def check_size(parameters: int, limit: int) -> None:
    """Refuse a model of far too many parameters before it is built."""
    if parameters > limit:
        raise ValueError(
            f"the model would have about {parameters:,} parameters; at most {limit:,} are allowed"
        )


class VAEConfig(StageConfig):
    """A diffusers `vae/config.json`."""

    diffusers_class: ClassVar[str] = "AutoencoderKL"

    in_channels: Channels = 3
    out_channels: Channels = 3
    down_block_types: tuple[Literal["DownEncoderBlock2D"], ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[Literal["UpDecoderBlock2D"], ...] = ("UpDecoderBlock2D",)
    block_out_channels: Annotated[tuple[Channels, ...], Field(min_length=1, max_length=8)] = (64,)
    layers_per_block: Annotated[int, Field(ge=1, le=16)] = 1
    act_fn: Literal["silu"] = "silu"
    latent_channels: Channels = 4
    norm_num_groups: Annotated[int, Field(ge=1, le=1024)] = 32
    sample_size: Annotated[int, Field(ge=1, le=65536)] | tuple[int, int] = 32
    scaling_factor: Annotated[float, Field(gt=0, le=1e4)] = 0.18215
    shift_factor: None = None
    latents_mean: None = None
    latents_std: None = None
    force_upcast: bool = True
    use_quant_conv: Literal[True] = True
    use_post_quant_conv: Literal[True] = True
    mid_block_add_attention: bool = True

    @property
    def spatial_factor(self) -> int:
        """Image pixels per latent pixel, along each side."""
        return 2 ** (len(self.block_out_channels) - 1)

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        stages = len(self.block_out_channels)
        for name in ("down_block_types", "up_block_types"):
            if len(getattr(self, name)) != stages:
                raise ValueError(f"{name} must have one entry for each of the {stages} block_out_channels")
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups:
                raise ValueError(
                    f"block_out_channels: {channels} is not a multiple of norm_num_groups {self.norm_num_groups}"
                )
        # The two resnet blocks of each middle, and those of every stage of encoder and decoder.
        convolutions = 8 * self.block_out_channels[-1] ** 2
        for width in self.block_out_channels:
            convolutions += (4 * self.layers_per_block + 2) * width**2
        check_size(9 * convolutions, _MAX_VAE_PARAMETERS)
        return self


class CLIPTextConfig(StageConfig):
    """The fields of a CLIP `text_encoder/config.json` that the model is built from.

    Unlike in the other stages unknown fields are ignored: every version of transformers adds some. `architectures`
    says whether the pooled state is projected.
    """

    model_config = ConfigDict(extra="ignore")
    diffusers_class: ClassVar[str] = "CLIPTextModel"

    architectures: tuple[Literal["CLIPTextModel"]] | tuple[Literal["CLIPTextModelWithProjection"]] | None = (
        "CLIPTextModel",
    )
    model_type: Literal["clip_text_model"] = "clip_text_model"
    vocab_size: Annotated[int, Field(ge=1, le=10**7)] = 49408
    hidden_size: Width = 512
    intermediate_size: Annotated[int, Field(ge=1, le=65536)] = 2048
    num_hidden_layers: Count = 12
    num_attention_heads: Count = 8
    max_position_embeddings: Annotated[int, Field(ge=3, le=65536)] = 77
    projection_dim: Width = 512
    hidden_act: Literal["quick_gelu", "gelu"] = "quick_gelu"
    layer_norm_eps: Annotated[float, Field(gt=0, le=1)] = 1e-5
    attention_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    use_attention_mask: Literal[False] = False
    pad_token_id: TokenId | None = 1
    bos_token_id: TokenId | None = 49406
    eos_token_id: TokenId | None = 49407

    def to_json(self) -> dict[str, Any]:
        """The content of a `config.json` that transformers reads as well."""
        return self.model_dump(mode="json")

    @property
    def projects(self) -> bool:
        """Whether a linear layer follows the pooled state."""
        return self.architectures == ("CLIPTextModelWithProjection",)

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} must divide hidden_size {self.hidden_size}"
            )
        layer = self.hidden_size * (4 * self.hidden_size + 2 * self.intermediate_size)
        embeddings = (self.vocab_size + self.max_position_embeddings) * self.hidden_size
        check_size(embeddings + self.num_hidden_layers * layer, _MAX_TEXT_PARAMETERS)
        return self
