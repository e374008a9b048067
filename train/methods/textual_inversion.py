"""Textual inversion (arXiv:2208.01618): only the vectors of a new token are trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentgen.adapters.textual_inversion import TextualInversion, with_embedding
from latentgen.errors import AdapterError, ConfigError
from latentgen.files import quote
from latentgen.models.text import CLIPText, join_towers
from latentgen.pipelines.base import Pipeline
from latentgen.train.config.tasks import TextualInversionMethod
from latentgen.train.methods.base import AnyPipeline, Method, save_adapter, towers_of

EMBEDDING_FILE = "learned_embeds.safetensors"
# A1111's names of the vectors of SDXL's two text encoders.
SDXL_KEYS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}


class TrainableEmbedding(nn.Module):
    """An embedding table of which only some rows are trained.

    Attributes:
        weight: the whole table [V, D], frozen; its rows `first` to `first + count - 1` are not used.
        vectors: the trained rows [n, D], in float32.
    """

    def __init__(self, table: nn.Embedding, first: int, count: int) -> None:
        super().__init__()
        self.first, self.count = first, count
        self.weight = nn.Parameter(table.weight.detach(), requires_grad=False)
        self.vectors = nn.Parameter(table.weight.detach()[first : first + count].float().clone())

    def forward(self, ids: Tensor) -> Tensor:
        """Look up token ids [...] as [..., D]."""
        places = ids - self.first
        is_new = (places >= 0) & (places < self.count)
        vectors = F.embedding(places.clamp(0, self.count - 1), self.vectors)
        return torch.where(is_new[..., None], vectors.to(self.weight.dtype), F.embedding(ids, self.weight))


class TextualInversionTraining(Method):
    """Trains the vectors of a new token, in every text encoder of the model."""

    def __init__(self, config: TextualInversionMethod) -> None:
        self.config = config

    def inject(self, pipeline: AnyPipeline) -> AnyPipeline:
        """Add the token to the text encoders; those of `pipeline` are not changed."""
        towers = towers_of(pipeline)
        token, count = self.config.token, self.config.num_vectors
        if any(
            len(tower.tokenizer(token, add_special_tokens=False).input_ids) == 1 for tower in towers.values()
        ):
            raise ConfigError(f"task.method.token: {quote(token)} exists; use another: {quote(f'<{token}>')}")
        vectors = {name: self._initial_vectors(tower) for name, tower in towers.items()}
        try:
            extended = with_embedding(towers, TextualInversion(token, vectors))
        except AdapterError as error:
            raise ConfigError(f"task.method.token: {error}") from None
        for tower in extended.values():
            table = tower.model.get_input_embeddings()
            assert isinstance(table, nn.Embedding)
            rows = TrainableEmbedding(table, len(tower.tokenizer) - count, count)
            tower.model.set_input_embeddings(rows)
        return replace(pipeline, text_encoder=join_towers(list(extended.values())))

    def _initial_vectors(self, tower: CLIPText) -> Tensor:
        """The rows [n, D] of the initializer's tokens, repeated where they are fewer than the vectors."""
        config, tokenizer = self.config, tower.tokenizer
        ids = tokenizer(config.initializer, add_special_tokens=False, verbose=False).input_ids
        if not ids or set(ids) & {*tokenizer.all_special_ids}:
            raise ConfigError(
                f"task.method.initializer: {quote(config.initializer)} is unknown to the tokenizer; use a plain word"
            )
        if len(ids) > config.num_vectors:
            pieces = ", ".join(map(quote, tokenizer.convert_ids_to_tokens(ids)))
            raise ConfigError(
                f"task.method.initializer: {quote(config.initializer)} is {len(ids)} tokens for the model ({pieces}), "
                f"but num_vectors is {config.num_vectors}; use a word that is a single token, or num_vectors={len(ids)}"
            )
        table = tower.model.get_input_embeddings()
        assert isinstance(table, nn.Embedding)
        chosen = [ids[index % len(ids)] for index in range(config.num_vectors)]
        return table.weight.detach()[chosen].float()

    def save(self, pipeline: Pipeline, folder: Path, *, half: bool) -> None:
        """Write the vectors as A1111 and diffusers read them."""
        vectors: dict[str, Tensor] = {}
        for name, tower in towers_of(pipeline).items():
            rows = tower.model.get_input_embeddings()
            assert isinstance(rows, TrainableEmbedding)
            vectors[name] = rows.vectors
        token = self.config.token
        keys = SDXL_KEYS if len(vectors) > 1 else dict.fromkeys(vectors, token)
        tensors = {keys[name]: tensor for name, tensor in vectors.items()}
        save_adapter(folder / EMBEDDING_FILE, tensors, {"name": token}, half=half)
