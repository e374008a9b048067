"""Fixed views that are encoded once, in memory or in a folder on disk that runs and processes share."""

from __future__ import annotations

from collections.abc import Sequence, Set
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
from latentgen.train.data import BatchIndices, Sample
from latentgen.train.distributed import gather, own_share
from latentgen.train.host_memory import temporarily_on
from latentgen.train.objectives.latents import (
    CondKind,
    EncodedView,
    LatentBatch,
    LatentDataset,
    OnTheFlyLatents,
    ViewEncoder,
    ViewInfo,
    ViewSource,
    batch_limit,
    cond_image,
    pixels_of,
)

_ENTRY = "latents"


def encode_views(
    encoder: ImageEncoder,
    device: torch.device,
    source: ViewSource,
    *,
    cond: CondKind = "none",
    cache_dir: Path | None = None,
) -> LatentDataset:
    """Encode fixed views now, or nothing yet if the source has new ones in every step.

    Identical images are encoded once. Without `cache_dir` every process encodes all of them and holds the latents in
    memory. With it each process encodes its share and all read from the disk, memory-mapped; what any run with this
    autoencoder has encoded before is not encoded again. The results are equal bit for bit, on devices of one kind.

    Args:
        encoder: on the CPU, where its weights stay unless they are needed in every step.
        device: where it encodes.
        source: the views.
        cond: what to store of the conditioning image `before` of each view; unless "none", every view must have one.
        cache_dir: the folder of the cache.

    Raises:
        OutputError: the cache cannot be written.
        DatasetError: a view has no conditioning image.
    """
    if not source.per_item:
        encoder.to(device)
        return OnTheFlyLatents(source, ViewEncoder(encoder, device), cond)
    with temporarily_on(encoder, device):
        cache = _open_cache(encoder, device, cache_dir)
        filler = _CacheFiller(ViewEncoder(encoder, device), source, cond, cache)
        if cache_dir is None:
            cached = filler.fill(source.distinct)
        else:
            cached = dict(gather(list(filler.fill(own_share(source.distinct)).items())))
            cache.refresh()
            # Another machine may have another folder.
            cached |= filler.fill([index for index, view in cached.items() if not view.is_in(cache)])
    return CachedLatents(source, [cached[index] for index in source.distinct], cache)


def _open_cache(encoder: ImageEncoder, device: torch.device, cache_dir: Path | None) -> TensorCache:
    """The cache of one autoencoder on one kind of device, as each kind rounds differently."""
    if cache_dir is None:
        return TensorCache(None)
    digest = content_key(
        "mean and std, float16", weights_digest([encoder]), repr(encoder.config), device.type
    )
    return TensorCache(cache_dir / f"latents-{digest[:32]}")


class CachedView(NamedTuple):
    """An encoded view: the cache keys of its latents, and of the latents or the pixels of its conditioning image."""

    info: ViewInfo
    key: str
    cond_key: str | None

    def is_in(self, cache: TensorCache) -> bool:
        """Whether the cache has them."""
        return self.key in cache and (self.cond_key is None or self.cond_key in cache)


class CachedLatents(LatentDataset):
    """Fixed views that were encoded once; the items of a batch are their indices in the source.

    `views` are the distinct ones, in the order of `source.distinct`; the cache holds their latents.
    """

    def __init__(self, source: ViewSource, views: Sequence[CachedView], cache: TensorCache) -> None:
        self._source = source
        self._views = views
        self._cache = cache

    @property
    def captions(self) -> Set[str] | None:
        if self._source.shuffles_captions:
            return None
        drawn = {view.info.captions for view in self._views}
        return {"", *(text for captions in drawn for text in captions.texts)}

    def batch(self, plan: BatchIndices, views: list[Sample] | None = None) -> LatentBatch:
        encoded = []
        for item in plan.items:
            info, key, cond_key = self._views[self._source.place(item)]
            cond = None if cond_key is None else self._tensor(cond_key)
            encoded.append(EncodedView(info, self._tensor(key), cond))
        return LatentBatch(plan, encoded, self._source.change_rngs(plan))

    def _tensor(self, key: str) -> Tensor:
        entry = self._cache.get(key)
        if entry is None:
            raise CheckpointCorruptError(
                f"the cache {quote(str(self._cache.folder))} was damaged during this run; resume the run"
            )
        return entry[_ENTRY]


class _CacheFiller:
    """Puts views into a cache.

    All batches of one image size are padded to the same shape: kernels may sum in another order for another shape, and
    the latents of an image would depend on how many others were missing from the cache.
    """

    def __init__(self, encoder: ViewEncoder, source: ViewSource, cond: CondKind, cache: TensorCache) -> None:
        self._encoder = encoder
        self._source = source
        self._cond = cond
        self._cache = cache
        # Images that wait for a full batch, by their size.
        self._waiting: dict[tuple[int, int], dict[str, Image.Image]] = {}

    def fill(self, indices: Sequence[int]) -> dict[int, CachedView]:
        """Encode those of the views `indices` that are not in the cache."""
        cached = {}
        views = self._source.stream(indices)
        bar = tqdm(views, "encoding the images", len(indices), mininterval=1.0, disable=not indices)
        for index, view in bar:
            key, cond_key = self._request(view.image), None
            if self._cond == "latents":
                cond_key = self._request(cond_image(view))
            elif self._cond == "pixels":
                cond_key = self._store_pixels(cond_image(view))
            info = ViewInfo.of(view, self._encoder.config.spatial_factor)
            cached[index] = CachedView(info, key, cond_key)
        for size in list(self._waiting):
            self._encode(size)
        self._cache.flush()
        return cached

    def _request(self, image: Image.Image) -> str:
        key = content_key(image.mode, repr(image.size), image.tobytes())
        waiting = self._waiting.setdefault(image.size, {})
        if key not in waiting and self._cache.get(key) is None:
            waiting[key] = image
            if len(waiting) == batch_limit(image.size):
                self._encode(image.size)
        return key

    def _store_pixels(self, image: Image.Image) -> str:
        key = content_key("pixels", image.mode, repr(image.size), image.tobytes())
        if key not in self._cache:
            self._cache.put(key, {_ENTRY: pixels_of(image)})
        return key

    def _encode(self, size: tuple[int, int]) -> None:
        waiting = self._waiting.pop(size)
        if not waiting:
            return
        images = list(waiting.values())
        filled = images + images[-1:] * (batch_limit(size) - len(images))
        for key, row in zip(waiting, self._encoder.encode(filled), strict=False):
            self._cache.put(key, {_ENTRY: row})
