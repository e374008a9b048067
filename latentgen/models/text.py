"""Text encoders: prompts in, conditioning out.

transformers takes seconds to import, so only the functions that make a model or a tokenizer do it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, Protocol, Self

import torch
from pydantic import ConfigDict, Field, model_validator
from torch import Tensor, nn

from latentgen.errors import CheckpointCorruptError, CheckpointMismatchError, CheckpointNotFoundError
from latentgen.files import atomic_write, quote, write_json
from latentgen.models.config import StageConfig
from latentgen.prompts import check_prompts, chunk_tokens, expand_tokens, token_expansions
from latentgen.weights import load_weights, save_weights

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

# Ten times the largest tower in use (OpenCLIP bigG, 7e8).
MAX_PARAMETERS = 7 * 10**9
# Begins the names of the weights up to transformers 5.5, which is also what files on the Hub hold.
_FILE_PREFIX = "text_model."

# Written by transformers before 4.31, and the same in every model.
_OLD_BUFFERS = (f"{_FILE_PREFIX}embeddings.position_ids", "embeddings.position_ids")
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json")

Width = Annotated[int, Field(ge=1, le=16384)]
Count = Annotated[int, Field(ge=1, le=1024)]
TokenId = Annotated[int, Field(ge=0, lt=10**7)]


class Conditioning(NamedTuple):
    """What a text encoder makes of B prompts.

    `context` [B, S, D] holds one vector per token, for cross-attention; `pooled` [B, P] one per prompt.
    """

    context: Tensor
    pooled: Tensor | None


class TextEncoder(Protocol):
    """Turns prompts into conditioning."""

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Encode B prompts; all rows get the same number of tokens S."""
        ...


class CLIPTextConfig(StageConfig):
    """The fields of a CLIP `text_encoder/config.json` that the model is built from.

    Unlike in the other stages unknown fields are passed over: every version of transformers adds bookkeeping.
    """

    model_config = ConfigDict(extra="ignore")
    diffusers_class: ClassVar[str] = "CLIPTextModel"

    architectures: tuple[Literal["CLIPTextModel"], ...] | None = ("CLIPTextModel",)
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
    def parameters(self) -> int:
        """The exact number of parameters, without building the model."""
        width, inner = self.hidden_size, self.intermediate_size
        attention = 4 * (width * width + width)
        feed_forward = 2 * width * inner + width + inner
        embeddings = (self.vocab_size + self.max_position_embeddings) * width
        return embeddings + self.num_hidden_layers * (attention + feed_forward + 4 * width) + 2 * width

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


class CLIPText:
    """CLIP's text transformer and its tokenizer (arXiv 2103.00020, section 2.4), run by transformers.

    Attributes:
        config: what the model was built from.
        model: the transformer; move it, train it and evaluate it like any module.
        tokenizer: turns text into token ids.
        window: tokens that the model reads at once, special tokens included.
    """

    def __init__(self, config: CLIPTextConfig, model: CLIPTextModel, tokenizer: CLIPTokenizer) -> None:
        if len(tokenizer) > config.vocab_size:
            raise CheckpointMismatchError(
                f"the tokenizer has {len(tokenizer):,} tokens, but the text encoder embeds"
                f" {config.vocab_size:,}; they belong to different models"
            )
        self.config = config
        self.model = model
        self.tokenizer = tokenizer
        self.window = min(tokenizer.model_max_length, config.max_position_embeddings)
        self._bos = _special_token(tokenizer.bos_token_id, "bos_token")
        self._eos = _special_token(tokenizer.eos_token_id, "eos_token")
        self._pad = _special_token(tokenizer.pad_token_id, "pad_token")
        self._expansions = token_expansions(tokenizer.get_added_vocab())

    @classmethod
    def from_config(cls, config: CLIPTextConfig, tokenizer: CLIPTokenizer) -> CLIPText:
        """Build an encoder with random weights, to be trained."""
        return cls(config, _build_model(config), tokenizer)

    @classmethod
    def from_folders(
        cls,
        config: CLIPTextConfig,
        tokenizer_folder: Path,
        weights: Sequence[Path],
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
    ) -> CLIPText:
        """Load an encoder strictly; nothing is initialised first.

        Args:
            config: from `text_encoder/config.json`.
            tokenizer_folder: holds `tokenizer.json`, or `vocab.json` and `merges.txt`.
            weights: the safetensors files.
            dtype: of the weights; that of the files if None.
            device: where the weights go.

        Raises:
            CheckpointError: the subclass says what is wrong with which file.
        """
        tokenizer = load_tokenizer(tokenizer_folder)
        with torch.device("meta"):
            model = _build_model(config)
        _make_position_ids(model, torch.device(device))
        flat = not any(name.startswith(_FILE_PREFIX) for name in model.state_dict())
        load_weights(
            model,
            weights,
            ignored_prefixes=_OLD_BUFFERS,
            dtype=dtype,
            device=device,
            rename=lambda key: ("" if flat else _FILE_PREFIX) + key.removeprefix(_FILE_PREFIX),
        )
        return cls(config, model.eval(), tokenizer)

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Encode B prompts to the last hidden states [B, S, D] and the pooled state [B, D] of the end token.

        S is a multiple of the window: longer prompts take several windows, each encoded by itself, and the
        other rows are filled up with empty ones. The pooled state is that of the first window.

        Raises:
            InputError: there is no prompt, or one is not text, holds NUL, or holds half of a surrogate pair.
        """
        return self.encode_tokens(self.tokenize(prompts).to(self.model.device))

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Token ids [B, chunks, window] of B prompts, on the CPU.

        Raises:
            InputError: as :meth:`encode`.
        """
        check_prompts(prompts)
        rows = self.tokenizer(list(prompts), add_special_tokens=False, verbose=False).input_ids
        rows = expand_tokens(rows, self._expansions)
        return torch.tensor(chunk_tokens(rows, self.window, bos=self._bos, eos=self._eos, pad=self._pad))

    def encode_tokens(self, ids: Tensor) -> Conditioning:
        """Encode token ids [B, chunks, window] on the model's device, as :meth:`encode` does."""
        output = self.model(input_ids=ids.flatten(0, 1))
        context = output.last_hidden_state.unflatten(0, ids.shape[:2]).flatten(1, 2)
        return Conditioning(context, output.pooler_output.unflatten(0, ids.shape[:2])[:, 0])

    def save(self, text_encoder_folder: Path, tokenizer_folder: Path, *, variant: str | None = None) -> None:
        """Write both folders of the diffusers layout, so that transformers of any version reads them.

        Raises:
            OutputError: a folder cannot be written.
        """
        state = {
            _FILE_PREFIX + name.removeprefix(_FILE_PREFIX): tensor
            for name, tensor in self.model.state_dict().items()
        }
        save_weights(state, text_encoder_folder, "model", variant=variant)
        write_json(text_encoder_folder / "config.json", self.config.to_json())
        self.save_tokenizer(tokenizer_folder)

    def save_tokenizer(self, folder: Path) -> None:
        """Write the tokenizer alone.

        Raises:
            OutputError: the folder cannot be written.
        """
        with tempfile.TemporaryDirectory() as scratch:
            self.tokenizer.save_pretrained(scratch)
            for made in sorted(Path(scratch).iterdir()):
                with atomic_write(folder / made.name) as file:
                    file.write(made.read_bytes())


def _build_model(config: CLIPTextConfig) -> CLIPTextModel:
    import transformers

    fields = config.model_dump(exclude={"architectures", "model_type", "use_attention_mask"})
    return transformers.CLIPTextModel(transformers.CLIPTextConfig(**fields))


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """Load a CLIP tokenizer from `tokenizer.json`, or `vocab.json` and `merges.txt`.

    Raises:
        CheckpointNotFoundError: the folder holds neither.
        CheckpointCorruptError: they cannot be read.
    """
    from transformers import CLIPTokenizer

    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise CheckpointNotFoundError(
            f"{quote(folder)} holds no tokenizer; looked for {' and '.join(_TOKENIZER_FILES)}"
        )
    try:
        return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    # The tokenizers library raises bare Exception for a malformed file.
    except Exception as error:
        raise CheckpointCorruptError(f"the tokenizer in {quote(folder)} cannot be read: {error}") from error


def _special_token(token_id: object, name: str) -> int:
    if not isinstance(token_id, int):
        raise CheckpointCorruptError(f"the tokenizer has no {name}; add it to tokenizer_config.json")
    return token_id


def _make_position_ids(model: nn.Module, device: torch.device) -> None:
    """Make the buffer that no file holds and that the meta device therefore left empty."""
    for module in model.modules():
        position_ids = module._buffers.get("position_ids")
        if position_ids is not None:
            module.register_buffer(
                "position_ids", torch.arange(position_ids.shape[-1], device=device)[None], persistent=False
            )
