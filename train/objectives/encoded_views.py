"""Views in the latents of a finished autoencoder, as objectives ask for them: kept, or encoded anew in every step."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence, Set
from functools import lru_cache
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from latentgen.errors import ConfigError
from latentgen.models.pixels import ImageEncoder
from latentgen.train.data import BatchIndices, CaptionedDataset, Sample
from latentgen.train.objectives.view_encoder import ViewEncoder, ViewFacts, image_before, pixels_of
from latentgen.train.objectives.view_source import ViewSource

NO_MASKS = "task.loss.masked is true, but no image of the training set has a mask; add them, or leave it out"
# What becomes of the image `before` of each view: not used, kept in latents, or kept as it is.
Shown = Literal["nothing", "latents", "pixels"]


class EncodedViews(ABC):
    """Views in latents, on the CPU, and what is known of them. All views of one batch have one size."""

    @abstractmethod
    def facts(self, plan: BatchIndices) -> list[ViewFacts]:
        """What is known of the view of each sample."""

    @abstractmethod
    def posteriors(self, plan: BatchIndices) -> list[Tensor]:
        """Mean and standard deviation of the latents of each sample's view: float16 [2, C, h, w] each."""

    @abstractmethod
    def shown_rows(self, plan: BatchIndices) -> list[Tensor]:
        """What is kept of the image `before` of each sample's view: as `posteriors`, or its pixels, uint8 [3, H, W]."""

    @abstractmethod
    def change_rngs(self, plan: BatchIndices) -> list[random.Random]:
        """A generator for each sample as that which the source's `change` was given for its view."""

    @property
    @abstractmethod
    def has_masks(self) -> bool:
        """Whether any view has a mask; true if that cannot be known."""

    @property
    @abstractmethod
    def captions(self) -> Set[str] | None:
        """All that `draw_captions` can give; None if that cannot be known, or a caption comes in many orders."""

    def latents(self, plan: BatchIndices) -> Tensor:
        """A draw from the posterior of each sample, float32 [B, C, h, w]."""
        mean, std = torch.stack(self.posteriors(plan)).float().unbind(1)
        return mean + std * plan.noise(mean.shape[1:], "posterior")

    def shown(self, plan: BatchIndices) -> Tensor:
        """The mean of the latents of each `before`, float16 [B, C, h, w], or the pixels, uint8 [B, 3, H, W]."""
        rows = self.shown_rows(plan)
        return torch.stack([row[0] if row.is_floating_point() else row for row in rows])

    def shown_latents(self, plan: BatchIndices) -> Tensor:
        """A draw from the posterior of each `before`, float32 [B, C, h, w]."""
        mean, std = torch.stack(self.shown_rows(plan)).float().unbind(1)
        return mean + std * plan.noise(mean.shape[1:], "shown posterior")

    def draw_captions(self, plan: BatchIndices, dropout: float) -> list[str]:
        """A caption for each sample, left empty at the rate of `dropout` (arXiv:2207.12598)."""
        captions = []
        for facts, rng in zip(self.facts(plan), plan.rngs("caption"), strict=True):
            dropped = rng.random() < dropout
            captions.append("" if dropped else facts.captions.draw(rng))
        return captions

    def masks_of(self, plan: BatchIndices) -> Tensor:
        """How much each place of each sample's latents counts: float32 [B, 1, h, w] in 0..1, 1 without a mask.

        Raises:
            ConfigError: no view has a mask.
        """
        if not self.has_masks:
            raise ConfigError(NO_MASKS)
        masks = [facts.mask for facts in self.facts(plan)]
        shape = self.posteriors(plan)[0].shape[-2:]
        everywhere = torch.full((1, *shape), 255, dtype=torch.uint8)
        return torch.stack([everywhere if mask is None else mask for mask in masks]).float() / 255

    def size_conditions(self, plan: BatchIndices) -> Tensor:
        """SDXL's time ids, float32 [B, 6]: height and width of the original, top and left of the crop, the view's size.

        arXiv:2307.01952, section 2.2, in the order of diffusers.
        """
        rows = [(*facts.original_size, *facts.crop_corner, *facts.size) for facts in self.facts(plan)]
        return torch.tensor(rows, dtype=torch.float32)


class Rows(Protocol):
    """One tensor for each view."""

    def __getitem__(self, index: int, /) -> Tensor: ...


class KeptViews(EncodedViews):
    """Views that were encoded once; a plan's items are their indices in the source.

    Args:
        source: the views.
        facts: what is known of the distinct ones.
        latents: of each of them, as `posteriors`.
        shown: of each of them, as `shown_rows`, if that is kept.
    """

    def __init__(
        self, source: ViewSource, facts: Sequence[ViewFacts], latents: Rows, shown: Rows | None
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

    def facts(self, plan: BatchIndices) -> list[ViewFacts]:
        return [self._facts[place] for place in self._places(plan)]

    def posteriors(self, plan: BatchIndices) -> list[Tensor]:
        return [self._latents[place] for place in self._places(plan)]

    def shown_rows(self, plan: BatchIndices) -> list[Tensor]:
        assert self._shown is not None  # encode_views was told of it
        return [self._shown[place] for place in self._places(plan)]

    def change_rngs(self, plan: BatchIndices) -> list[random.Random]:
        return [self._source.change_rng(item) for item in plan.items]

    def _places(self, plan: BatchIndices) -> list[int]:
        return [self._source.place(item) for item in plan.items]


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
        self._drawn: tuple[BatchIndices, list[Sample]] | None = None
        # A batch asks several times.
        self._batch = lru_cache(maxsize=2)(self._encode)

    @property
    def has_masks(self) -> bool:
        return True

    @property
    def captions(self) -> Set[str] | None:
        return None

    def facts(self, plan: BatchIndices) -> list[ViewFacts]:
        return self._batch(plan).facts

    def posteriors(self, plan: BatchIndices) -> list[Tensor]:
        return self._batch(plan).posteriors

    def shown_rows(self, plan: BatchIndices) -> list[Tensor]:
        return self._batch(plan).shown

    def change_rngs(self, plan: BatchIndices) -> list[random.Random]:
        return self._source.fresh_change_rngs(plan)

    def draw(self, plan: BatchIndices) -> list[Sample]:
        """The views of a batch."""
        return self._source.fresh(plan)

    def keep(self, plan: BatchIndices, views: list[Sample]) -> None:
        """What `draw` gave for the batch that is asked for next."""
        self._drawn = (plan, views)

    def _encode(self, plan: BatchIndices) -> _Batch:
        views = self._drawn[1] if self._drawn and self._drawn[0] == plan else self.draw(plan)
        facts = [self._encoder.facts(view) for view in views]
        posteriors = self._encoder.encode([view.image for view in views])
        shown: list[Tensor] = []
        if self._shown == "latents":
            shown = self._encoder.encode([image_before(view) for view in views])
        elif self._shown == "pixels":
            shown = [pixels_of(image_before(view)) for view in views]
        return _Batch(facts, posteriors, shown)


class SketchedViews(EncodedViews):
    """Views that are drawn and not encoded: their latents are zeros, for those who ask for the shape of a batch."""

    def __init__(self, source: ViewSource, encoder: ImageEncoder, shown: Shown) -> None:
        self._source = source
        self._encoder = ViewEncoder(encoder, torch.device("cpu"))
        self._config = encoder.config
        self._shown: Shown = shown
        self._draw = lru_cache(maxsize=2)(self._drawn)

    @property
    def has_masks(self) -> bool:
        return True

    @property
    def captions(self) -> Set[str] | None:
        """As KeptViews.captions or FreshViews.captions will be, by what the first view tells of all."""
        if not self._source.per_item or self._source.fixed(0).captions.shuffle_after is not None:
            return None
        return {"", *self._source.data.captions()}

    def facts(self, plan: BatchIndices) -> list[ViewFacts]:
        return [self._encoder.facts(view) for view in self._draw(plan)]

    def posteriors(self, plan: BatchIndices) -> list[Tensor]:
        channels, factor = self._config.latent_channels, self._config.spatial_factor
        sizes = [(view.image.height // factor, view.image.width // factor) for view in self._draw(plan)]
        return [torch.zeros(2, channels, *size, dtype=torch.float16) for size in sizes]

    def shown_rows(self, plan: BatchIndices) -> list[Tensor]:
        if self._shown == "latents":
            return self.posteriors(plan)
        return [pixels_of(image_before(view)) for view in self._draw(plan)]

    def change_rngs(self, plan: BatchIndices) -> list[random.Random]:
        if not self._source.per_item:
            return self._source.fresh_change_rngs(plan)
        return [self._source.change_rng(item) for item in plan.items]

    def _drawn(self, plan: BatchIndices) -> list[Sample]:
        if not self._source.per_item:
            return self._source.fresh(plan)
        return [self._source.fixed(item) for item in plan.items]


def has_masks(data: CaptionedDataset) -> bool:
    """Whether any image has a mask; they are read up to the first that does."""
    return any(data.sample(item, random.Random(0)).mask is not None for item in range(len(data)))
