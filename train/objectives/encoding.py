"""Views of images in the latents of a finished autoencoder: encoded once and kept, or anew in every step."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, TypeVar

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import get_worker_info
from tqdm import tqdm

from latentgen.errors import CheckpointCorruptError, ConfigError, DatasetError
from latentgen.files import quote
from latentgen.models.pixels import ImageEncoder
from latentgen.train.cache import TensorCache, content_key, weights_digest
from latentgen.train.data import BatchPlan, CaptionedImages, View, sample_rng
from latentgen.train.data.threads import THREADS, in_threads
from latentgen.train.objectives.lent import lent
from latentgen.train.objectives.view_encoder import EncodingQueue, ViewEncoder, ViewFacts, pixels_of
from latentgen.train.sharing import gather, own_share

_DRAWN_AHEAD = 64
_ENTRY = "latents"
S = TypeVar("S")
T = TypeVar("T")

Change = Callable[[View, random.Random], View]
# What becomes of the image `before` of each view: not used, kept in latents, or kept as it is.
Shown = Literal["nothing", "latents", "pixels"]


@dataclass(frozen=True)
class ViewSource:
    """Which views a run sees, the same ones in every process.

    Attributes:
        data: the images.
        per_item: how many fixed views of every item; 0 for new ones in every step.
        seed: the run's seed.
        change: what is done to every view, with random numbers of its own.
    """

    data: CaptionedImages
    per_item: int
    seed: int
    change: Change | None = None

    def __len__(self) -> int:
        return len(self.data) * max(1, self.per_item)

    def fixed(self, index: int) -> View:
        """A fixed view: those of one item follow each other."""
        item, number = divmod(index, self.per_item)
        view = self.data.view(item, sample_rng(self.seed, "cached view", item, number))
        return view if self.change is None else self.change(view, self.change_rng(index))

    def change_rng(self, index: int) -> random.Random:
        """The generator that a fixed view is changed with."""
        return sample_rng(self.seed, "degradation", index)

    def fresh(self, plan: BatchPlan) -> list[View]:
        """A new view for each sample of a batch."""
        places = list(zip(plan.items, plan.rngs("view"), self.fresh_change_rngs(plan), strict=True))

        def draw(place: tuple[int, random.Random, random.Random]) -> View:
            item, rng, change_rng = place
            view = self.data.view(item, rng)
            return view if self.change is None else self.change(view, change_rng)

        return _in_threads(draw, places)

    def fresh_change_rngs(self, plan: BatchPlan) -> list[random.Random]:
        """The generators that new views are changed with."""
        return list(plan.rngs("degradation"))


class EncodedViews(ABC):
    """Views in latents, on the CPU, and what is known of them. All views of one batch have one size."""

    @abstractmethod
    def facts(self, plan: BatchPlan) -> list[ViewFacts]:
        """What is known of the view of each sample."""

    @abstractmethod
    def posteriors(self, plan: BatchPlan) -> list[Tensor]:
        """Mean and standard deviation of the latents of each sample's view: float16 [2, C, h, w] each."""

    @abstractmethod
    def shown_rows(self, plan: BatchPlan) -> list[Tensor]:
        """What is kept of the image `before` of each sample's view: as `posteriors`, or its pixels, uint8 [3, H, W]."""

    @abstractmethod
    def change_rngs(self, plan: BatchPlan) -> list[random.Random]:
        """A generator for each sample as that which the source's `change` was given for its view."""

    @property
    @abstractmethod
    def has_masks(self) -> bool:
        """Whether any view has a mask; true if that cannot be known."""

    @property
    @abstractmethod
    def captions(self) -> Set[str] | None:
        """All that `draw_captions` can give; None if that cannot be known, or a caption comes in many orders."""

    def latents(self, plan: BatchPlan) -> Tensor:
        """A draw from the posterior of each sample, float32 [B, C, h, w]."""
        mean, std = torch.stack(self.posteriors(plan)).float().unbind(1)
        return mean + std * plan.noise(mean.shape[1:], "posterior")

    def shown(self, plan: BatchPlan) -> Tensor:
        """The mean of the latents of each `before`, float16 [B, C, h, w], or the pixels, uint8 [B, 3, H, W]."""
        rows = self.shown_rows(plan)
        return torch.stack([row[0] if row.is_floating_point() else row for row in rows])

    def shown_latents(self, plan: BatchPlan) -> Tensor:
        """A draw from the posterior of each `before`, float32 [B, C, h, w]."""
        mean, std = torch.stack(self.shown_rows(plan)).float().unbind(1)
        return mean + std * plan.noise(mean.shape[1:], "shown posterior")

    def draw_captions(self, plan: BatchPlan, dropout: float) -> list[str]:
        """A caption for each sample, left empty at the rate of `dropout` (arXiv:2207.12598)."""
        captions = []
        for facts, rng in zip(self.facts(plan), plan.rngs("caption"), strict=True):
            dropped = rng.random() < dropout
            captions.append("" if dropped else facts.captions.draw(rng))
        return captions

    def masks_of(self, plan: BatchPlan) -> Tensor:
        """How much each place of each sample's latents counts: float32 [B, 1, h, w] in 0..1, 1 without a mask.

        Raises:
            ConfigError: no view has a mask.
        """
        if not self.has_masks:
            raise ConfigError(
                "task.loss.masked is true, but no image of the training set has a mask; add them, or leave it out"
            )
        masks = [facts.mask for facts in self.facts(plan)]
        shape = self.posteriors(plan)[0].shape[-2:]
        everywhere = torch.full((1, *shape), 255, dtype=torch.uint8)
        return torch.stack([everywhere if mask is None else mask for mask in masks]).float() / 255

    def size_conditions(self, plan: BatchPlan) -> Tensor:
        """SDXL's time ids, float32 [B, 6]: height and width of the original, top and left of the crop, the view's size.

        arXiv:2307.01952, section 2.2, in the order of diffusers.
        """
        rows = [(*facts.original_size, *facts.crop_corner, *facts.size) for facts in self.facts(plan)]
        return torch.tensor(rows, dtype=torch.float32)


class KeptViews(EncodedViews):
    """Views that were encoded once; a plan's items are their indices."""

    def __init__(
        self, source: ViewSource, facts: Sequence[ViewFacts], latents: _Rows, shown: _Rows | None
    ) -> None:
        self._source = source
        self._facts = facts
        self._latents = latents
        self._shown = shown
        self._has_masks = any(view.mask is not None for view in facts)

    @property
    def has_masks(self) -> bool:
        return self._has_masks

    @property
    def captions(self) -> Set[str] | None:
        drawn = {view.captions for view in self._facts}
        if any(captions.shuffle_after is not None for captions in drawn):
            return None
        return {"", *(text for captions in drawn for text in captions.texts)}

    def facts(self, plan: BatchPlan) -> list[ViewFacts]:
        return [self._facts[item] for item in plan.items]

    def posteriors(self, plan: BatchPlan) -> list[Tensor]:
        return [self._latents[item] for item in plan.items]

    def shown_rows(self, plan: BatchPlan) -> list[Tensor]:
        assert self._shown is not None  # encode_views was told of it
        return [self._shown[item] for item in plan.items]

    def change_rngs(self, plan: BatchPlan) -> list[random.Random]:
        return [self._source.change_rng(item) for item in plan.items]


class _Batch(NamedTuple):
    facts: list[ViewFacts]
    posteriors: list[Tensor]
    shown: list[Tensor]


class FreshViews(EncodedViews):
    """Views that are drawn and encoded when a batch asks for them: nothing is kept, on disk or in memory.

    The encoder stays on its device. Processes that prepare batches draw alone: they may not use an accelerator, and on
    a CPU they have one thread, with which an encoder rounds differently.
    """

    def __init__(self, source: ViewSource, encoder: ViewEncoder, shown: Shown) -> None:
        self._source = source
        self._encoder = encoder
        self._shown: Shown = shown
        self._drawn: tuple[BatchPlan, list[View]] | None = None
        # A batch asks several times.
        self._batch = lru_cache(maxsize=2)(self._encode)

    @property
    def has_masks(self) -> bool:
        return True

    @property
    def captions(self) -> Set[str] | None:
        return None

    def facts(self, plan: BatchPlan) -> list[ViewFacts]:
        return self._batch(plan).facts

    def posteriors(self, plan: BatchPlan) -> list[Tensor]:
        return self._batch(plan).posteriors

    def shown_rows(self, plan: BatchPlan) -> list[Tensor]:
        return self._batch(plan).shown

    def change_rngs(self, plan: BatchPlan) -> list[random.Random]:
        return self._source.fresh_change_rngs(plan)

    def draw(self, plan: BatchPlan) -> list[View]:
        """The views of a batch."""
        return self._source.fresh(plan)

    def keep(self, plan: BatchPlan, views: list[View]) -> None:
        """What `draw` gave for the batch that is asked for next."""
        self._drawn = (plan, views)

    def _encode(self, plan: BatchPlan) -> _Batch:
        views = self._drawn[1] if self._drawn and self._drawn[0] == plan else self.draw(plan)
        facts = [self._encoder.facts(view) for view in views]
        posteriors = self._encoder.encode([view.image for view in views])
        shown: list[Tensor] = []
        if self._shown == "latents":
            shown = self._encoder.encode([_before(view) for view in views])
        elif self._shown == "pixels":
            shown = [pixels_of(_before(view)) for view in views]
        return _Batch(facts, posteriors, shown)


def encode_views(
    encoder: ImageEncoder,
    device: torch.device,
    source: ViewSource,
    *,
    shown: Shown = "nothing",
    cache_dir: Path | None = None,
) -> EncodedViews:
    """Encode fixed views now, or nothing yet if the source has new ones in every step.

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
    indices = range(len(source))
    for index, view in _drawn(source, indices):
        facts.append(encoder.facts(view))
        queue.add(view.image, lambda row, index=index: latents.__setitem__(index, row))
        if shown == "latents":
            queue.add(_before(view), lambda row, index=index: before.__setitem__(index, row))
        elif shown == "pixels":
            before[index] = pixels_of(_before(view))
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
    filed = dict(gather(_file_views(encoder, source, shown, cache, own_share(range(len(source))))))
    cache.refresh()
    # Other machines may not see this folder.
    missing = [index for index, view in filed.items() if not view.is_in(cache)]
    filed.update(_file_views(encoder, source, shown, cache, missing))
    views = [filed[index] for index in range(len(source))]
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
    for index, view in _drawn(source, indices):
        key, shown_key = ask(view.image), None
        if shown == "latents":
            shown_key = ask(_before(view))
        elif shown == "pixels":
            image = _before(view)
            shown_key = content_key("pixels", image.mode, repr(image.size), image.tobytes())
            if shown_key not in cache:
                cache.put(shown_key, {_ENTRY: pixels_of(image)})
        filed.append((index, _Filed(encoder.facts(view), key, shown_key)))
    queue.finish()
    cache.flush()
    return filed


class _Rows(Protocol):
    """One tensor for each view."""

    def __getitem__(self, index: int, /) -> Tensor: ...


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


def _drawn(source: ViewSource, indices: Sequence[int]) -> Iterator[tuple[int, View]]:
    """The fixed views of `indices`, drawn a few at a time."""
    with tqdm(total=len(indices), desc="encoding the images", mininterval=1.0, disable=not indices) as bar:
        for start in range(0, len(indices), _DRAWN_AHEAD):
            part = indices[start : start + _DRAWN_AHEAD]
            yield from zip(part, _in_threads(source.fixed, part), strict=True)
            bar.update(len(part))


def _in_threads(draw: Callable[[S], T], places: Sequence[S]) -> list[T]:
    """`draw` of each place, several at a time; one after the other in a process that is one of many already."""
    if THREADS == 1 or len(places) == 1 or get_worker_info() is not None:
        return [draw(place) for place in places]
    return in_threads(draw, places)


def _before(view: View) -> Image.Image:
    if view.before is None:
        raise DatasetError("an image has no image that it is an edit of, which this task shows to the UNet")
    return view.before
