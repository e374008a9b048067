"""Textual inversion (arXiv:2208.01618): new tokens with their own vectors for a text encoder.

Files come in two formats, as safetensors: diffusers' single tensor under the name of the token, and A1111's
`emb_params`; for SDXL it is a pair, `clip_l` and `clip_g`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from latentgen.adapters.lora_layers import shared_copy
from latentgen.checkpoints.folder import as_path
from latentgen.checkpoints.identify import likely_architecture
from latentgen.checkpoints.io import Header, MappedFile, check_values
from latentgen.checkpoints.weights import first_five
from latentgen.errors import AdapterError
from latentgen.files import quote
from latentgen.models.text import CLIPText
from latentgen.prompts import token_expansions

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

MAX_VECTORS = 1024
_MAX_TOKEN_LENGTH = 200
_DTYPES = ("F16", "BF16", "F32", "F64")
_A1111_KEYS = frozenset({"emb_params", "string_to_param.*"})
_SDXL_KEYS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}


@dataclass(frozen=True)
class TextualInversion:
    """The content of an embedding file.

    Attributes:
        token: the word for the embedding in a prompt.
        vectors: component -> [n, D], one row per vector. A file for a single text encoder does not name it; its
            vectors are those of "text_encoder".
    """

    token: str
    vectors: Mapping[str, Tensor]


def read_embedding(source: str | Path, *, token: str | None = None) -> TextualInversion:
    """Read an embedding file.

    Args:
        source: a `.safetensors` file.
        token: the word for it in prompts; None takes the name in the file, or else the name of the file.

    Raises:
        CheckpointNotFoundError, CheckpointCorruptError: the file cannot be read.
        UnsafeCheckpointError: the file is a pickle.
        CheckpointValueError: it holds NaN or infinity.
        AdapterError: it is not an embedding, or the token cannot be one.
    """
    path = as_path(source)
    mapped = MappedFile(path)
    header = mapped.header
    keys = _components(header, path)
    single = next(iter(keys), "")
    if token is None:
        named = len(header) == 1 and single not in _A1111_KEYS | _SDXL_KEYS.keys()
        token = single if named else header.metadata.get("name", path.stem)
    _check_token(token, quote(path))
    vectors: dict[str, Tensor] = {}
    for key, component in keys.items():
        tensor = mapped.tensor(key)
        check_values(tensor, None, key, path)
        vectors[component] = tensor.reshape(-1, tensor.shape[-1])
    if len({len(rows) for rows in vectors.values()}) > 1:
        counts = ", ".join(f"{len(rows)} for {component}" for component, rows in vectors.items())
        raise AdapterError(f"{quote(path)} has different numbers of vectors for its text encoders: {counts}")
    return TextualInversion(token, vectors)


def _components(header: Header, path: Path) -> dict[str, str]:
    """The component of each tensor of the file; AdapterError if it is not an embedding."""
    if len(header) == 1 or (header and header.keys() <= _SDXL_KEYS.keys()):
        keys = {key: _SDXL_KEYS.get(key, "text_encoder") for key in header}
    else:
        likely = likely_architecture(header)
        hint = f"; it is probably {likely}" if likely else ""
        raise AdapterError(
            f"{quote(path)} is not an embedding: it has {len(header)} tensors ({first_five(list(header))}); one "
            f"tensor, or {' and '.join(_SDXL_KEYS)}, are needed{hint}"
        )
    for key in keys:
        dtype, shape, _ = header[key]
        if dtype not in _DTYPES or len(shape) not in (1, 2) or math.prod(shape[:-1]) > MAX_VECTORS:
            raise AdapterError(
                f"{quote(path)}: the embedding {quote(key)} is {dtype} {list(shape)}; allowed are [D] and [n, D] with "
                f"n up to {MAX_VECTORS:,}, in {', '.join(_DTYPES)}"
            )
    return keys


def _check_token(token: str, where: str) -> None:
    plain = token.isprintable() and token == " ".join(token.split())
    if not token or not plain or len(token) > _MAX_TOKEN_LENGTH:
        raise AdapterError(
            f"{where}: {quote(token)} cannot be a token; allowed are up to {_MAX_TOKEN_LENGTH} printable "
            "characters with single spaces between words: name another token"
        )


def with_embedding(encoders: Mapping[str, CLIPText], embedding: TextualInversion) -> dict[str, CLIPText]:
    """Copies of the text encoders of a model with one more token; the originals are unchanged.

    A token with n vectors becomes n tokens, "<cat>", "<cat>_1", ..., as in diffusers; a prompt contains the first. The
    copies share all weights except the embedding table; the new rows have its dtype and device.

    Args:
        encoders: text encoders by component; each needs its own vectors.
        embedding: from :func:`read_embedding`.

    Raises:
        AdapterError: the embedding is for other encoders, it has another width, or its token exists already.
    """
    vectors = embedding.vectors
    if len(vectors) == len(encoders) == 1:
        vectors = dict(zip(encoders, vectors.values(), strict=True))
    if vectors.keys() != encoders.keys():
        raise AdapterError(
            f"embedding {quote(embedding.token)} has vectors for {' and '.join(vectors)}, but the model has "
            f"{' and '.join(encoders) or 'no text encoder'}; it was made for another family of models"
        )
    return {name: _extended(encoder, embedding.token, vectors[name]) for name, encoder in encoders.items()}


def _extended(encoder: CLIPText, token: str, vectors: Tensor) -> CLIPText:
    table = encoder.model.get_input_embeddings()
    assert isinstance(table, nn.Embedding)
    width = table.weight.shape[1]
    if vectors.shape[1] != width:
        raise AdapterError(
            f"embedding {quote(token)} has vectors of width {vectors.shape[1]}, the text encoder has {width}; it "
            "was made for another family of models"
        )
    tokenizer = _with_tokens(encoder.tokenizer, token, len(vectors))
    new = vectors.to(table.weight)
    if not torch.isfinite(new).all():
        raise AdapterError(
            f"embedding {quote(token)} has values too large for {new.dtype}; load the model in float32"
        )
    # The ids of the new tokens follow those of the tokenizer; the table may already have rows for them.
    size, first = max(len(table.weight), len(tokenizer)), len(tokenizer) - len(new)
    weight = new.new_zeros(size, width)
    weight[: len(table.weight)] = table.weight.detach()
    weight[first : len(tokenizer)] = new
    model = shared_copy(encoder.model)  # adapters included
    frozen = not table.weight.requires_grad
    model.set_input_embeddings(
        nn.Embedding.from_pretrained(weight, freeze=frozen, padding_idx=table.padding_idx)
    )
    model.config.vocab_size = size
    config = encoder.config.model_copy(update={"vocab_size": size})
    return CLIPText(config, model, tokenizer, layer=encoder.layer)


def _with_tokens(tokenizer: CLIPTokenizer, token: str, count: int) -> CLIPTokenizer:
    """A copy of a tokenizer with `count` new tokens, whose ids follow the existing ones."""
    tokens = [token, *(f"{token}_{index}" for index in range(1, count))]
    vocabulary = tokenizer.get_vocab()
    if clash := [name for name in tokens if name in vocabulary]:
        raise AdapterError(f"the token {quote(clash[0])} exists already; give the embedding another token")
    extended = copy.deepcopy(tokenizer)
    first = len(extended)
    expected = token_expansions(tokenizer.get_added_vocab())
    if count > 1:
        expected[first] = tuple(range(first, first + count))
    extended.add_tokens(tokens)
    added = extended.get_added_vocab()
    # Tokens are matched in lower case, and one may be part of another.
    unread = [
        name for name, index in added.items() if extended.encode(name, add_special_tokens=False) != [index]
    ]
    # The vectors of a token are numbered _1, _2, ...; they must not be read as those of another token.
    is_joined = token_expansions(added) != expected
    if unread or is_joined or added.get(token) != first or len(extended) != first + count:
        raise AdapterError(
            f"the tokenizer cannot tell the token {quote(token)} from others; give the embedding another token"
        )
    return extended
