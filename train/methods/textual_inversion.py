"""Textual inversion (arXiv:2208.01618): vectors for a new token, and nothing else, are learnt."""

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
from latentgen.train.methods.base import AnyPipeline, Method, save_learnt, towers_of

EMBEDDING_FILE = "learned_embeds.safetensors"
# As A1111 names the vectors of SDXL's two text encoders.
SDXL_KEYS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}


class LearntRows(nn.Module):
    """A table of embeddings of which some rows learn: they alone are a parameter that gets gradients.

    Attributes:
        weight: the whole table [V, D], frozen; its rows from `first` on are not looked at.
        vectors: the rows that learn [n, D], in float32.
    """

    def __init__(self, table: nn.Embedding, first: int, count: int) -> None:
        super().__init__()
        self.first, self.count = first, count
        self.weight = nn.Parameter(table.weight.detach(), requires_grad=False)
        self.vectors = nn.Parameter(table.weight.detach()[first : first + count].float().clone())

    def forward(self, ids: Tensor) -> Tensor:
        """Look up token ids [...] as [..., D]."""
        places = ids - self.first
        learnt = (places >= 0) & (places < self.count)
        vectors = F.embedding(places.clamp(0, self.count - 1), self.vectors)
        return torch.where(learnt[..., None], vectors.to(self.weight.dtype), F.embedding(ids, self.weight))


class TextualInversionTraining(Method):
    """Trains the vectors of a new token, in every text encoder of the model."""

    trains_text = True

    def __init__(self, config: TextualInversionMethod) -> None:
        self.config = config

    def put_into(self, pipeline: AnyPipeline) -> AnyPipeline:
        """See Method."""
        towers = towers_of(pipeline)
        token, count = self.config.token, self.config.num_vectors
        if any(
            len(tower.tokenizer(token, add_special_tokens=False).input_ids) == 1 for tower in towers.values()
        ):
            raise ConfigError(
                f"task.method.token: {quote(token)} is a word that the model knows already; choose one that it does "
                f"not, such as {quote(f'<{token}>')}"
            )
        vectors = {name: self._initial_vectors(tower) for name, tower in towers.items()}
        try:
            extended = with_embedding(towers, TextualInversion(token, vectors))
        except AdapterError as error:
            raise ConfigError(f"task.method.token: {error}") from None
        for tower in extended.values():
            table = tower.model.get_input_embeddings()
            assert isinstance(table, nn.Embedding)
            rows = LearntRows(table, len(tower.tokenizer) - count, count)
            tower.model.set_input_embeddings(rows)
        return replace(pipeline, text_encoder=join_towers(list(extended.values())))

    def _initial_vectors(self, tower: CLIPText) -> Tensor:
        """The rows [n, D] of the words that the vectors begin as, from the first again where there are fewer."""
        config, tokenizer = self.config, tower.tokenizer
        ids = tokenizer(config.initializer, add_special_tokens=False, verbose=False).input_ids
        if not ids or set(ids) & {*tokenizer.all_special_ids}:
            raise ConfigError(
                f"task.method.initializer: {quote(config.initializer)} is unknown to the model's tokenizer; use a "
                "plain word, such as the kind of thing that is to be learnt"
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
        """See Method."""
        vectors: dict[str, Tensor] = {}
        for name, tower in towers_of(pipeline).items():
            rows = tower.model.get_input_embeddings()
            assert isinstance(rows, LearntRows)
            vectors[name] = rows.vectors
        token = self.config.token
        keys = SDXL_KEYS if len(vectors) > 1 else dict.fromkeys(vectors, token)
        tensors = {keys[name]: tensor for name, tensor in vectors.items()}
        save_learnt(folder / EMBEDDING_FILE, tensors, {"name": token}, half=half)
