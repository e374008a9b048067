"""From the captions of a batch to the UNet's text conditioning: encoded in every step, or once before the first."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import get_worker_info
from tqdm import tqdm

from latentgen.errors import CheckpointMismatchError, ConfigError
from latentgen.models.text import Conditioning, TextEncoder
from latentgen.train.cache import TensorCache, content_key, weights_digest
from latentgen.train.distributed import gather, own_share
from latentgen.train.host_memory import temporarily_on

TEXT_BATCH = 32
_KEYS_IN_MEMORY = 2**18
_CONTEXT = "context"
_POOLED = "pooled"


class TextConditioner:
    """Turns captions into tensors of a batch, and those into the conditioning of the UNet.

    Without a `cache` of the encoder's outputs each step encodes the token ids that its batch holds.
    """

    def __init__(self, text: TextEncoder, cache: CaptionCache | None = None) -> None:
        self._text = text
        self._cache = cache
        self._is_pair = len(text.towers) > 1  # SDXL's

    @property
    def trains(self) -> bool:
        """Whether any weight of the text encoder is trained."""
        return any(parameter.requires_grad for parameter in self._text.module.parameters())

    def add(self, captions: Iterable[str]) -> None:
        """Encode captions that batches will have; see CaptionCache.add."""
        if self._cache is not None:
            self._cache.add(captions)

    def tensors(self, captions: Sequence[str]) -> tuple[Tensor, ...]:
        """What a batch holds of B captions.

        From the cache: the context [B, S, D], and for SDXL's pair also the pooled states [B, P]. Without one: token ids
        [B, chunks, window], for the pair [B, 2, chunks, window].

        Raises:
            CheckpointMismatchError: the pair's tokenizers split a caption differently.
        """
        if self._cache is not None:
            context, pooled = self._cache.encode(captions)
            return (context,) if pooled is None or not self._is_pair else (context, pooled)
        tokens = [tower.tokenize(captions) for tower in self._text.towers]
        if not self._is_pair:
            return (tokens[0],)
        if tokens[0].shape != tokens[1].shape:
            raise CheckpointMismatchError(
                "the two tokenizers split a caption into different numbers of chunks; they are of different models"
            )
        return (torch.stack(tokens, dim=1),)

    def conditioning(self, inputs: list[Tensor]) -> Conditioning:
        """The conditioning of a batch; removes from the front of `inputs` what `tensors` has returned."""
        first = inputs.pop(0)
        if self._cache is not None:
            return Conditioning(first, inputs.pop(0) if self._is_pair else None)
        ids = first.unbind(1) if self._is_pair else (first,)
        with torch.set_grad_enabled(self.trains and torch.is_grad_enabled()):
            encoded = [tower.encode_tokens(own) for tower, own in zip(self._text.towers, ids, strict=True)]
        return Conditioning(torch.cat([part.context for part in encoded], dim=-1), encoded[-1].pooled)


class CaptionCache:
    """The conditioning of captions by a text encoder that is not trained; each distinct caption is encoded once.

    The conditioning of a caption does not depend on other captions, nor on which were encoded before: all encoder
    batches have the same number of rows, padded with empty captions. So a run with `cache_dir` equals one without
    it bit for bit, on devices of one kind. With it memory holds only the keys.

    Args:
        text: the encoder, on the CPU, where its weights stay; they must not change afterwards.
        device: where it encodes.
        cache_dir: the folder of the cache; None keeps everything in memory, in float32: 640 KB a caption for SDXL.
    """

    def __init__(self, text: TextEncoder, device: torch.device, cache_dir: Path | None = None) -> None:
        self._text = text
        self._device = device
        self._key_of = lru_cache(_KEYS_IN_MEMORY)(self._read)
        folder = None
        if cache_dir is not None:
            layers = ",".join(tower.layer for tower in text.towers)
            weights = weights_digest(tower.model for tower in text.towers)
            configs = repr([tower.config for tower in text.towers])
            digest = content_key("text, float32", weights, configs, layers, device.type)
            folder = cache_dir / f"text-{digest[:32]}"
        self._entries = TensorCache(folder)

    def add(self, captions: Iterable[str]) -> None:
        """Encode these captions where they are new; each process does its share if there is a folder to share.

        All processes must call it, with the same captions.

        Raises:
            InputError: a caption cannot be encoded as text.
            OutputError: the cache cannot be written.
        """
        distinct = sorted({*captions, ""})
        if self._entries.folder is not None:
            self._encode_missing(own_share(distinct))
            gather([])
            self._entries.refresh()
        self._encode_missing(distinct)

    def encode(self, captions: Sequence[str]) -> Conditioning:
        """The conditioning of B captions, on the CPU, equal to :meth:`TextEncoder.encode` up to rounding.

        Captions that were not added before are encoded now.

        Raises:
            InputError: a caption cannot be encoded as text.
            ConfigError: a caption is new, in a data loader process, which cannot use the device.
            OutputError: the cache cannot be written.
        """
        self._encode_missing(captions)
        rows = [self._entry(caption) for caption in captions]
        longest = max(len(row[_CONTEXT]) for row in rows)
        context = torch.stack([self._padded(row[_CONTEXT], longest) for row in rows])  # [B, S, D]
        pooled = torch.stack([row[_POOLED] for row in rows]) if _POOLED in rows[0] else None
        return Conditioning(context, pooled)

    def _padded(self, context: Tensor, length: int) -> Tensor:
        """A context [S, D] followed by windows of the empty caption, up to `length`."""
        if len(context) == length:
            return context
        self._encode_missing([""])
        window = self._entry("")[_CONTEXT]
        return torch.cat([context, window.repeat((length - len(context)) // len(window), 1)])

    def _entry(self, caption: str) -> dict[str, Tensor]:
        entry = self._entries.get(self._key_of(caption)[0])
        assert entry is not None  # missing ones were encoded
        return entry

    def _read(self, caption: str) -> tuple[str, int]:
        """The key of a caption, which is a hash of its token ids, and its number of windows."""
        rows = [tower.tokenize([caption]) for tower in self._text.towers]
        parts = (f"{list(row.shape)} {row.flatten().tolist()}" for row in rows)
        return content_key(*parts), rows[0].shape[1]

    def _encode_missing(self, captions: Iterable[str]) -> None:
        distinct = {self._key_of(caption): caption for caption in captions}
        by_windows: dict[int, list[tuple[str, str]]] = {}
        for (key, windows), caption in distinct.items():
            if self._entries.get(key) is None:
                by_windows.setdefault(windows, []).append((key, caption))
        if not by_windows:
            return
        if self._device.type != "cpu" and get_worker_info() is not None:
            raise ConfigError(
                f"the text encoder runs on {self._device.type}, which data-loading workers cannot use; set workers to 0"
            )
        self._text.module.eval()
        total = sum(map(len, by_windows.values()))
        bar = tqdm(total=total, desc="encoding the captions", mininterval=1.0)
        with temporarily_on(self._text.module, self._device), bar:
            for _, alike in sorted(by_windows.items()):
                for start in range(0, len(alike), TEXT_BATCH):
                    part = alike[start : start + TEXT_BATCH]
                    self._encode([caption for _, caption in part], [key for key, _ in part])
                    bar.update(len(part))
        self._entries.flush()

    @torch.no_grad()
    def _encode(self, captions: list[str], keys: list[str]) -> None:
        filled = captions + [""] * (TEXT_BATCH - len(captions))
        with torch.autocast(self._device.type, enabled=False):
            context, pooled = self._text.encode(filled)
        for row, key in enumerate(keys):
            # Copies, so that no entry holds the memory of its whole batch.
            entry = {_CONTEXT: context[row].to("cpu", torch.float32, copy=True)}
            if pooled is not None:
                entry[_POOLED] = pooled[row].to("cpu", torch.float32, copy=True)
            self._entries.put(key, entry)
