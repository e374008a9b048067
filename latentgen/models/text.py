"""Text encoders: prompts in, conditioning out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from latentgen.checkpoints.weights import Weights, save_weights
from latentgen.errors import CheckpointCorruptError, CheckpointMismatchError, InputError
from latentgen.files import write_json
from latentgen.models.config import CLIPTextConfig
from latentgen.models.text_loading import (
    OLD_BUFFERS,
    build_model,
    empty_model,
    name_in_files,
    name_with_prefix,
    save_tokenizer,
)
from latentgen.prompts import WeightedPrompt, as_weighted, chunk_tokens, expand_tokens, token_expansions

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

# A mean of hidden states below this fraction of their size counts as zero.
_ROUNDING = 1e-5

# Which hidden states are the context: the last, normalized (SD 1.x and 2.x), or those before the last layer, without
# the norm (SDXL, arXiv:2307.01952, section 2).
ContextLayer = Literal["last", "penultimate"]


class Conditioning(NamedTuple):
    """The output of a text encoder for B prompts; pipelines also accept one in place of prompts.

    `context` [B, S, D] has one vector per token, for cross-attention; `pooled` [B, P] one per prompt. In diffusers they
    are `prompt_embeds` and `pooled_prompt_embeds`; only SDXL needs the second.
    """

    context: Tensor
    pooled: Tensor | None = None


class CLIPText:
    """CLIP's text transformer and its tokenizer (arXiv 2103.00020, section 2.4), run by transformers.

    Attributes:
        config: the configuration of the model.
        model: the transformer; move it, train it and evaluate it like any module.
        tokenizer: the one that the model was trained with.
        layer: which hidden states are the context.
        towers: the text transformers of this encoder, here itself.
        module: all weights of this encoder.
        window: tokens that are encoded at once, special tokens included.
        context_width: channels D of the context.
        pooled_width: channels P of the pooled state.
    """

    def __init__(
        self,
        config: CLIPTextConfig,
        model: CLIPTextModel | CLIPTextModelWithProjection,
        tokenizer: CLIPTokenizer,
        *,
        layer: ContextLayer = "last",
    ) -> None:
        if len(tokenizer) > config.vocab_size:
            raise CheckpointMismatchError(
                f"the tokenizer has {len(tokenizer):,} tokens, but the text encoder embeds"
                f" {config.vocab_size:,}; they belong to different models"
            )
        self.config = config
        self.model = self.module = model
        self.tokenizer = tokenizer
        self.layer: ContextLayer = layer
        self.towers = (self,)
        self.context_width = config.hidden_size
        self.pooled_width = config.projection_dim if config.projects else config.hidden_size
        self._pooled = "text_embeds" if config.projects else "pooler_output"
        self.window = min(tokenizer.model_max_length, config.max_position_embeddings)
        self._bos = _special_token(tokenizer.bos_token_id, "bos_token")
        self._eos = _special_token(tokenizer.eos_token_id, "eos_token")
        self._pad = _special_token(tokenizer.pad_token_id, "pad_token")
        self._expansions = token_expansions(tokenizer.get_added_vocab())

    @classmethod
    def from_config(cls, config: CLIPTextConfig, tokenizer: CLIPTokenizer) -> CLIPText:
        """Build an encoder with random weights, to be trained."""
        return cls(config, build_model(config), tokenizer)

    @classmethod
    def from_weights(
        cls,
        config: CLIPTextConfig,
        tokenizer: CLIPTokenizer,
        weights: Weights,
        *,
        layer: ContextLayer = "last",
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
    ) -> CLIPText:
        """Load an encoder strictly, without initializing it first; `dtype` None is that of the files.

        Raises:
            CheckpointError: a file is damaged or unsupported; the subclass says which.
        """
        model, prefix = empty_model(config, torch.device(device))
        weights.load_into(
            model,
            ignored_prefixes=OLD_BUFFERS,
            dtype=dtype,
            device=device,
            rename=lambda key: name_with_prefix(key, prefix),
        )
        return cls(config, model.eval(), tokenizer, layer=layer)

    def with_model(self, model: CLIPTextModel | CLIPTextModelWithProjection) -> CLIPText:
        """The same encoder with another model of the same configuration."""
        return CLIPText(self.config, model, self.tokenizer, layer=self.layer)

    def encode(self, prompts: Sequence[str | WeightedPrompt], *, clip_skip: int = 0) -> Conditioning:
        """Encode B prompts to hidden states [B, S, D] and the pooled state [B, P] of the end token.

        S is a multiple of the window: a longer prompt is encoded in several windows, one by one, and the other rows
        are padded with empty ones. The pooled state is that of the first window, without weights; see :func:`weigh`.

        Args:
            prompts: of any length; a str is text without any weights.
            clip_skip: how many more of the last layers the context skips.

        Raises:
            InputError: there is no prompt; one is not text, or contains NUL or half of a surrogate pair; or the model
                has too few layers to skip.
        """
        ids, weights = self._tokens(prompts)
        encoded = self.encode_tokens(ids.to(self.model.device), clip_skip=clip_skip)
        if weights is None:
            return encoded
        return encoded._replace(context=weigh(encoded.context, weights.to(self.model.device)))

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Token ids [B, chunks, window] of B prompts, on the CPU.

        Raises:
            InputError: as :meth:`encode`.
        """
        return self._tokens(prompts)[0]

    def _tokens(self, prompts: Sequence[str | WeightedPrompt]) -> tuple[Tensor, Tensor | None]:
        """Token ids and, if any are other than 1, their weights: both [B, chunks, window], on the CPU."""
        weighted = as_weighted(prompts)
        texts = [piece.text for prompt in weighted for part in prompt.parts for piece in part]
        rows = self.tokenizer(texts, add_special_tokens=False, verbose=False).input_ids
        following = iter(expand_tokens(rows, self._expansions))
        pieces = [
            [[(next(following), piece.weight) for piece in part] for part in prompt.parts]
            for prompt in weighted
        ]
        ids = [[[token for tokens, _ in part for token in tokens] for part in row] for row in pieces]
        chunks = torch.tensor(chunk_tokens(ids, self.window, bos=self._bos, eos=self._eos, pad=self._pad))
        if not any(prompt.is_weighted for prompt in weighted):
            return chunks, None
        weights = [[[weight for tokens, weight in part for _ in tokens] for part in row] for row in pieces]
        return chunks, torch.tensor(chunk_tokens(weights, self.window, bos=1.0, eos=1.0, pad=1.0))

    def encode_tokens(self, ids: Tensor, *, clip_skip: int = 0) -> Conditioning:
        """Encode token ids [B, chunks, window] on the model's device, as :meth:`encode` does."""
        unused = clip_skip + (self.layer == "penultimate")
        if unused >= self.config.num_hidden_layers:
            raise InputError(
                f"clip_skip={clip_skip} leaves none of the text encoder's {self.config.num_hidden_layers} layers; use "
                f"at most {self.config.num_hidden_layers - 1 - (self.layer == 'penultimate')}"
            )
        output = self.model(input_ids=ids.flatten(0, 1), output_hidden_states=unused > 0)
        context = output.hidden_states[-1 - unused] if unused else output.last_hidden_state
        if unused and self.layer == "last":
            # transformers 5.6 without a projection has the layers in the model itself.
            owner: Any = self.model._modules.get("text_model") or self.model
            context = owner.final_layer_norm(context)
        pooled = output[self._pooled]
        context = context.unflatten(0, ids.shape[:2]).flatten(1, 2)
        return Conditioning(context, pooled.unflatten(0, ids.shape[:2])[:, 0])

    def state_dict(self) -> dict[str, Tensor]:
        """The weights, named as in files, whatever this version of transformers names them."""
        return {name_in_files(name): tensor for name, tensor in self.model.state_dict().items()}

    def save(self, text_encoder_folder: Path, tokenizer_folder: Path, *, variant: str | None = None) -> None:
        """Write both folders of the diffusers layout, so that transformers of any version reads them.

        Raises:
            OutputError: a folder cannot be written.
        """
        save_weights(self.state_dict(), text_encoder_folder, "model", variant=variant)
        write_json(text_encoder_folder / "config.json", self.config.to_json())
        save_tokenizer(self.tokenizer, tokenizer_folder)


class CLIPTextPair:
    """SDXL's two text encoders (arXiv:2307.01952, section 2): contexts concatenated, the pooled state of the second.

    Attributes are those of :class:`CLIPText`.
    """

    def __init__(self, first: CLIPText, second: CLIPText) -> None:
        if first.window != second.window:
            raise CheckpointMismatchError(
                f"the text encoders have windows of {first.window} and {second.window} tokens, of different models"
            )
        self.towers = (first, second)
        self.module = nn.ModuleList([first.model, second.model])
        self.window = first.window
        self.context_width = first.context_width + second.context_width
        self.pooled_width = second.pooled_width

    def encode(self, prompts: Sequence[str | WeightedPrompt], *, clip_skip: int = 0) -> Conditioning:
        """Encode B prompts to a context [B, S, D1 + D2] and the pooled state [B, P2], as :meth:`CLIPText.encode` does.

        Each tower's hidden states are weighted separately.
        """
        first, second = (tower.encode(prompts, clip_skip=clip_skip) for tower in self.towers)
        if first.context.shape[1] != second.context.shape[1]:
            raise CheckpointMismatchError(
                "the tokenizers split a prompt into different numbers of chunks; they belong to different models"
            )
        return Conditioning(torch.cat([first.context, second.context], dim=-1), second.pooled)


def weigh(context: Tensor, weights: Tensor) -> Tensor:
    """Multiply hidden states [B, chunks * window, D] by the weights [B, chunks, window] of their tokens.

    Each chunk is then scaled to its previous mean over tokens and channels, as in A1111 (its "original" emphasis),
    unless one of the means is within rounding of zero. In float32; a chunk whose weights are all 1 is unchanged to the
    bit.
    """
    chunks = context.float().unflatten(1, weights.shape[1:])
    weighted = chunks * weights[..., None]
    before, after = (states.mean((-2, -1), keepdim=True) for states in (chunks, weighted))
    rounding = _ROUNDING * weighted.abs().mean((-2, -1), keepdim=True)
    above_rounding = (before.abs() > rounding) & (after.abs() > rounding)
    return (weighted * torch.where(above_rounding, before / after, 1.0)).flatten(1, 2).to(context.dtype)


TextEncoder: TypeAlias = CLIPText | CLIPTextPair


def join_towers(towers: Sequence[CLIPText]) -> TextEncoder:
    """One tower, or the pair of two."""
    return CLIPTextPair(*towers) if len(towers) == 2 else towers[0]


def _special_token(token_id: object, name: str) -> int:
    if not isinstance(token_id, int):
        raise CheckpointCorruptError(f"the tokenizer has no {name}; add it to tokenizer_config.json")
    return token_id
