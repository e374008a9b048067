"""Encoding fixed views once, to memory or to a folder on disk."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from latentgen.errors import CheckpointCorruptError
from latentgen.files import quote
from latentgen.models.pixels import ImageEncoder
from latentgen.train.cache import TensorCache, content_key, weights_digest
from latentgen.train.data import Sample
from latentgen.train.distributed import gather, own_share
from latentgen.train.objectives.encoded_views import EncodedViews, FreshViews, KeptViews, Shown
from latentgen.train.objectives.lent import lent
from latentgen.train.objectives.view_encoder import (
    EncodingQueue,
    ViewEncoder,
    ViewFacts,
    image_before,
    pixels_of,
)
from latentgen.train.objectives.view_source import ViewSource

_ENTRY = "latents"


def encode_views(
    encoder: ImageEncoder,
    device: torch.device,
    source: ViewSource,
    *,
    shown: Shown = "nothing",
    cache_dir: Path | None = None,
) -> EncodedViews:
    """Encode fixed views now, or nothing yet if the source has new ones in every step.

    Views that are the same by what the source says of them are encoded once.
    Without `cache_dir` every process encodes all of them and holds them in memory. With it each encodes its share and
    all read from the disk, memory-mapped; what any run with this autoencoder has encoded before is not encoded again.
    The results are equal bit for bit, on devices of one kind.

    Args:
        encoder: on the CPU, where its weights stay unless they are needed in every step.
        device: where it encodes.
        source: the views.
        shown: what to keep of the image `before` of each view, which then all have.
        cache_dir: the folder of the cache.

    Raises:
        OutputError: the cache cannot be written.
    """
    engine = ViewEncoder(encoder, device)
    if not source.per_item:
        encoder.to(device)
        return FreshViews(source, engine, shown)
    with lent(encoder, device):
        if cache_dir is None:
            return _encode_to_memory(engine, source, shown)
        return _encode_to_disk(engine, source, shown, _latents_cache(encoder, device, cache_dir))


def _latents_cache(encoder: ImageEncoder, device: torch.device, cache_dir: Path) -> TensorCache:
    """Where the latents of one autoencoder lie. Kinds of devices round differently, so each has its own."""
    digest = content_key(
        "mean and std, float16", weights_digest([encoder]), repr(encoder.config), device.type
    )
    return TensorCache(cache_dir / f"latents-{digest[:32]}")


def _encode_to_memory(encoder: ViewEncoder, source: ViewSource, shown: Shown) -> KeptViews:
    facts: list[ViewFacts] = []
    latents: dict[int, Tensor] = {}
    before: dict[int, Tensor] = {}
    queue = EncodingQueue(encoder)
    for place, (_, view) in enumerate(_with_bar(source, source.distinct)):
        facts.append(encoder.facts(view))
        queue.add(view.image, lambda row, place=place: latents.__setitem__(place, row))
        if shown == "latents":
            queue.add(image_before(view), lambda row, place=place: before.__setitem__(place, row))
        elif shown == "pixels":
            before[place] = pixels_of(image_before(view))
    queue.finish()
    return KeptViews(source, facts, latents, None if shown == "nothing" else before)


class _Filed(NamedTuple):
    """A view whose latents lie in the cache, under the keys of its image and of what is shown of it."""

    facts: ViewFacts
    key: str
    shown_key: str | None

    def is_in(self, cache: TensorCache) -> bool:
        return self.key in cache and (self.shown_key is None or self.shown_key in cache)


def _encode_to_disk(encoder: ViewEncoder, source: ViewSource, shown: Shown, cache: TensorCache) -> KeptViews:
    filed = dict(gather(_file_views(encoder, source, shown, cache, own_share(source.distinct))))
    cache.refresh()
    # Other machines may not see this folder.
    missing = [index for index, view in filed.items() if not view.is_in(cache)]
    filed.update(_file_views(encoder, source, shown, cache, missing))
    views = [filed[index] for index in source.distinct]
    shown_keys = [view.shown_key for view in views if view.shown_key is not None]
    return KeptViews(
        source,
        [view.facts for view in views],
        _CachedRows(cache, [view.key for view in views]),
        _CachedRows(cache, shown_keys) if shown_keys else None,
    )


def _file_views(
    encoder: ViewEncoder, source: ViewSource, shown: Shown, cache: TensorCache, indices: Sequence[int]
) -> list[tuple[int, _Filed]]:
    """Put into the cache what is not there of the views of `indices`."""
    queue = EncodingQueue(encoder)
    waiting: set[str] = set()

    def ask(image: Image.Image) -> str:
        key = content_key(image.mode, repr(image.size), image.tobytes())
        if key not in waiting and cache.get(key) is None:
            waiting.add(key)
            queue.add(image, lambda row: cache.put(key, {_ENTRY: row}))
        return key

    filed = []
    for index, view in _with_bar(source, indices):
        key, shown_key = ask(view.image), None
        if shown == "latents":
            shown_key = ask(image_before(view))
        elif shown == "pixels":
            image = image_before(view)
            shown_key = content_key("pixels", image.mode, repr(image.size), image.tobytes())
            if shown_key not in cache:
                cache.put(shown_key, {_ENTRY: pixels_of(image)})
        filed.append((index, _Filed(encoder.facts(view), key, shown_key)))
    queue.finish()
    cache.flush()
    return filed


class _CachedRows:
    """Rows that lie in a cache, of which memory holds the keys."""

    def __init__(self, cache: TensorCache, keys: Sequence[str]) -> None:
        self._cache = cache
        self._keys = [bytes.fromhex(key) for key in keys]

    def __getitem__(self, index: int, /) -> Tensor:
        entry = self._cache.get(self._keys[index].hex())
        if entry is None:
            raise CheckpointCorruptError(
                f"the cache in {quote(self._cache.folder)} was damaged while this run read it; resume the run, which "
                "makes anew what is missing"
            )
        return entry[_ENTRY]


def _with_bar(source: ViewSource, indices: Sequence[int]) -> Iterable[tuple[int, Sample]]:
    """The fixed views of `indices`, with a bar of progress."""
    drawn, count = source.drawn(indices), len(indices)
    return tqdm(drawn, total=count, desc="encoding the images", mininterval=1.0, disable=not count)
