"""The configuration of CLIP's text transformers, as `text_encoder/config.json` has it."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from latentgen.models.config import StageConfig

# Ten times the largest tower in use (OpenCLIP bigG, 7e8).
MAX_PARAMETERS = 7 * 10**9

Width = Annotated[int, Field(ge=1, le=16384)]
Count = Annotated[int, Field(ge=1, le=1024)]
TokenId = Annotated[int, Field(ge=0, lt=10**7)]


class CLIPTextConfig(StageConfig):
    """The fields of a CLIP `text_encoder/config.json` that the model is built from.

    Unlike in the other stages unknown fields are passed over: every version of transformers adds bookkeeping.
    `architectures` says whether the pooled state is projected.
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

    @property
    def parameters(self) -> int:
        """The exact number of parameters, without building the model."""
        width, inner = self.hidden_size, self.intermediate_size
        attention = 4 * (width * width + width)
        feed_forward = 2 * width * inner + width + inner
        embeddings = (self.vocab_size + self.max_position_embeddings) * width
        projection = width * self.projection_dim if self.projects else 0
        return (
            projection
            + embeddings
            + self.num_hidden_layers * (attention + feed_forward + 4 * width)
            + 2 * width
        )

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} must divide hidden_size {self.hidden_size}"
            )
        if self.parameters > MAX_PARAMETERS:
            raise ValueError(
                f"the model would have {self.parameters:,} parameters; at most {MAX_PARAMETERS:,} are allowed"
            )
        return self
