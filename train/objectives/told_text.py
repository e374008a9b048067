"""What a UNet is told of captions: encoded in every step, or once before the first."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from latentgen.errors import CheckpointMismatchError
from latentgen.models.text import Conditioning, TextEncoder
from latentgen.train.objectives.text_cache import TextCache


class ToldText:
    """The way from the captions of a batch to what the UNet is told.

    Args:
        text: encodes them.
        cache: what it gives for them; with None each step encodes its own, from the token ids that the batch holds.
    """

    def __init__(self, text: TextEncoder, cache: TextCache | None = None) -> None:
        self._text = text
        self._cache = cache

    @property
    def learns(self) -> bool:
        """Whether anything of the text encoder is trained."""
        return any(parameter.requires_grad for parameter in self._text.module.parameters())

    def add(self, captions: Iterable[str]) -> None:
        """There will be these captions as well; see TextCache.add."""
        if self._cache is not None:
            self._cache.add(captions)

    def rows(self, captions: Sequence[str]) -> tuple[Tensor, ...]:
        """What a batch holds of B captions.

        From the cache that is the context [B, S, D], and of SDXL's pair the pooled states [B, P] besides. Without one
        it is the token ids [B, chunks, window], of the pair [B, 2, chunks, window].

        Raises:
            CheckpointMismatchError: the pair's tokenizers cut a caption differently.
        """
        if self._cache is not None:
            context, pooled = self._cache.encode(captions)
            return (context,) if pooled is None or not self._is_pair else (context, pooled)
        tokens = [tower.tokenize(captions) for tower in self._text.towers]
        if not self._is_pair:
            return (tokens[0],)
        if tokens[0].shape != tokens[1].shape:
            raise CheckpointMismatchError(
                "the two tokenizers cut a caption into different numbers of chunks; they belong to different models"
            )
        return (torch.stack(tokens, dim=1),)

    def take(self, rows: list[Tensor]) -> Conditioning:
        """The conditioning that a batch tells of; what `rows` gave is taken off the front of `rows`."""
        first = rows.pop(0)
        if self._cache is not None:
            return Conditioning(first, rows.pop(0) if self._is_pair else None)
        ids = first.unbind(1) if self._is_pair else (first,)
        with torch.set_grad_enabled(self.learns and torch.is_grad_enabled()):
            encoded = [tower.encode_tokens(own) for tower, own in zip(self._text.towers, ids, strict=True)]
        return Conditioning(torch.cat([part.context for part in encoded], dim=-1), encoded[-1].pooled)

    @property
    def _is_pair(self) -> bool:
        return len(self._text.towers) > 1
