"""What a frozen text encoder makes of captions, encoded once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from latentgen.models.text import Conditioning, TextEncoder
from latentgen.train.cache import TensorCache, content_key, weights_digest
from latentgen.train.distributed import gather, own_share, refuse_in_worker
from latentgen.train.objectives.lent import lent

TEXT_BATCH = 32
_KEPT_KEYS = 2**18
_CONTEXT = "context"
_POOLED = "pooled"


class TextCache:
    """The conditioning of captions whose text encoder does not learn; each distinct caption is encoded once.

    What a caption gives does not depend on the others, nor on which were encoded before: batches all have the same
    number of rows, filled up with empty captions. So a run with `cache_dir`, whoever filled it, equals one without it
    bit for bit, on devices of one kind. With it memory holds nothing but the keys.

    Args:
        text: the encoder, on the CPU, where its weights stay; it may not change afterwards.
        device: where it encodes.
        cache_dir: the folder of the cache; None keeps everything in memory.
        dtype: what is kept; the encoder works in that of its weights. SDXL's conditioning of one caption is 640 KB in
            float32.
        clip_skip: how many more layers, at the end, the context goes without.
    """

    def __init__(
        self,
        text: TextEncoder,
        *,
        device: torch.device,
        cache_dir: Path | None = None,
        dtype: torch.dtype = torch.float32,
        clip_skip: int = 0,
    ) -> None:
        self._text = text
        self._device = device
        self._dtype = dtype
        self._clip_skip = clip_skip
        self._key_of = lru_cache(_KEPT_KEYS)(self._read)
        self._entries: _Entries
        if cache_dir is None:
            self._entries = _InMemory()
            return
        layers = ",".join(tower.layer for tower in text.towers)
        weights = weights_digest(tower.model for tower in text.towers)
        configs = repr([tower.config for tower in text.towers])
        digest = content_key("text", weights, configs, layers, str(clip_skip), str(dtype), device.type)
        self._entries = TensorCache(cache_dir / f"text-{digest[:32]}")

    def add(self, captions: Iterable[str]) -> None:
        """Encode what is new of these captions, each process its share if there is a folder to share.

        All processes must come here with the same captions.

        Raises:
            InputError: a caption is no text that can be encoded.
            OutputError: the cache cannot be written.
        """
        distinct = sorted({*captions, ""})
        if isinstance(self._entries, TensorCache):
            self._encode_missing(own_share(distinct))
            gather([])
            self._entries.refresh()
        self._encode_missing(distinct)

    def encode(self, captions: Sequence[str]) -> Conditioning:
        """The conditioning of B captions, on the CPU, as :meth:`TextEncoder.encode` gives it up to rounding.

        Captions that were not added before are encoded now.

        Raises:
            InputError: a caption is no text that can be encoded.
            ConfigError: one is new, in a process that prepares batches and cannot use the device.
            OutputError: the cache cannot be written.
        """
        keys = [self._key_of(caption)[0] for caption in captions]
        entries = [self._entries.get(key) for key in keys]
        empty: dict[str, Tensor] | None = None
        if any(entry is None for entry in entries):
            self._encode_missing(captions)
            entries = [self._entries.get(key) for key in keys]
        rows = [entry for entry in entries if entry is not None]
        assert len(rows) == len(captions)  # the missing ones were encoded
        longest = max(len(row[_CONTEXT]) for row in rows)
        if any(len(row[_CONTEXT]) < longest for row in rows):
            self._encode_missing([""])
            empty = self._entries.get(self._key_of("")[0])
        context = torch.stack([_filled(row[_CONTEXT], longest, empty) for row in rows])
        pooled = torch.stack([row[_POOLED] for row in rows]) if _POOLED in rows[0] else None
        return Conditioning(context, pooled)

    def _read(self, caption: str) -> tuple[str, int]:
        """The key of a caption, which is what the tokenizers make of it, and its number of windows."""
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
        refuse_in_worker(self._device, "encoding a new caption")
        self._text.module.eval()
        total = sum(map(len, by_windows.values()))
        bar = tqdm(total=total, desc="encoding the captions", mininterval=1.0)
        with lent(self._text.module, self._device), bar:
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
            context, pooled = self._text.encode(filled, clip_skip=self._clip_skip)
        for row, key in enumerate(keys):
            entry = {_CONTEXT: context[row].to("cpu", self._dtype, copy=True)}
            if pooled is not None:
                entry[_POOLED] = pooled[row].to("cpu", self._dtype, copy=True)
            self._entries.put(key, entry)


class _Entries(Protocol):
    """Where entries are kept."""

    def get(self, key: str) -> dict[str, Tensor] | None: ...

    def put(self, key: str, tensors: dict[str, Tensor]) -> None: ...

    def flush(self) -> None: ...


class _InMemory:
    """Entries of this run alone."""

    def __init__(self) -> None:
        self._entries: dict[str, dict[str, Tensor]] = {}

    def get(self, key: str) -> dict[str, Tensor] | None:
        return self._entries.get(key)

    def put(self, key: str, tensors: dict[str, Tensor]) -> None:
        self._entries[key] = tensors

    def flush(self) -> None:
        """Nothing waits."""


def _filled(context: Tensor, length: int, empty: dict[str, Tensor] | None) -> Tensor:
    """A context [S, D] with the windows of an empty caption behind it, up to `length`."""
    if len(context) == length:
        return context
    assert empty is not None  # where lengths differ it was asked for
    window = empty[_CONTEXT]
    return torch.cat([context, window.repeat((length - len(context)) // len(window), 1)])
