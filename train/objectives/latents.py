"""Training images in the latents of a pretrained autoencoder: encoded in every step, or once in latent_cache.py."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import get_worker_info

from latentgen.errors import DatasetError
from latentgen.models.pixels import ImageEncoder
from latentgen.train.data import BatchIndices, CaptionedDataset, Captions, Sample, sample_rng, to_tensor
from latentgen.train.data.sample_checks import THREADS, in_threads

# How many images are encoded at once: an autoencoder needs several GB for each megapixel, next to the model.
ENCODING_BATCH = 32
ENCODING_PIXELS = 2**18
_DRAWN_AHEAD = 64
S = TypeVar("S")
T = TypeVar("T")

# What is stored of the image `before` of each view, the conditioning image: nothing, its latents, or its pixels.
CondKind = Literal["none", "latents", "pixels"]
Change = Callable[[Sample, random.Random], Sample]


@dataclass(frozen=True)
class ViewSource:
    """Which views of the images a run sees, the same ones in every process.

    Attributes:
        data: the images.
        per_item: how many fixed views of every item; 0 for new views in every step.
        seed: the run's seed.
        change: applied to every view, with a generator of its own.
        random_change: whether `change` uses its generator.
    """

    data: CaptionedDataset
    per_item: int
    seed: int
    change: Change | None = None
    random_change: bool = True

    def __len__(self) -> int:
        return len(self.data) * max(1, self.per_item)

    def fixed(self, index: int) -> Sample:
        """A fixed view; those of one item have consecutive indices."""
        item, number = divmod(index, self.per_item)
        return self._view(item, sample_rng(self.seed, "cached view", item, number), self._change_rng(index))

    @property
    def distinct(self) -> range:
        """The fixed views that differ from the one before: only the first of every item if nothing is random."""
        return range(0, len(self), self._repeats)

    def place(self, index: int) -> int:
        """The position in `distinct` of the view that a fixed view is identical to."""
        return index // self._repeats

    @property
    def _repeats(self) -> int:
        """How many consecutive fixed views are identical."""
        varies = self.data.is_random or (self.change is not None and self.random_change)
        return 1 if varies else self.per_item

    @property
    def shuffles_captions(self) -> bool:
        """Whether the parts of captions are shuffled each time they are drawn."""
        return self.data.sample(0, random.Random(0)).captions.shuffle_after is not None

    def stream(self, indices: Sequence[int]) -> Iterator[tuple[int, Sample]]:
        """Each of `indices` with its fixed view, drawn a few at a time."""
        for start in range(0, len(indices), _DRAWN_AHEAD):
            part = indices[start : start + _DRAWN_AHEAD]
            yield from zip(part, _in_threads(self.fixed, part), strict=True)

    def views(self, plan: BatchIndices) -> list[Sample]:
        """The view of each sample of a batch: fixed, or drawn by step and sample."""
        if self.per_item:
            return _in_threads(self.fixed, plan.items)
        places = zip(plan.items, plan.rngs("view"), self.change_rngs(plan), strict=True)
        return _in_threads(lambda place: self._view(*place), list(places))

    def change_rngs(self, plan: BatchIndices) -> list[random.Random]:
        """For each sample, a generator in the state in which `change` received it."""
        if self.per_item:
            return [self._change_rng(item) for item in plan.items]
        return list(plan.rngs("degradation"))

    def _change_rng(self, index: int) -> random.Random:
        return sample_rng(self.seed, "degradation", index)

    def _view(self, item: int, rng: random.Random, change_rng: random.Random) -> Sample:
        view = self.data.sample(item, rng)
        return view if self.change is None else self.change(view, change_rng)


def _in_threads(draw: Callable[[S], T], places: Sequence[S]) -> list[T]:
    """`draw` of each place, several at a time; one after the other in a data loader process, which is one of many."""
    if THREADS == 1 or len(places) == 1 or get_worker_info() is not None:
        return [draw(place) for place in places]
    return in_threads(draw, places)


class ViewInfo(NamedTuple):
    """The metadata of a view: everything except its latents.

    Attributes:
        captions: its possible captions.
        size: height and width.
        original_size: height and width of the whole image.
        crop_corner: top and left of the crop.
        mask: where the loss counts, at the resolution of the latents: uint8 [1, h, w]; None for everywhere.
    """

    captions: Captions
    size: tuple[int, int]
    original_size: tuple[int, int]
    crop_corner: tuple[int, int]
    mask: Tensor | None

    @classmethod
    def of(cls, view: Sample, spatial_factor: int) -> ViewInfo:
        """Read it from a view; the mask is scaled down by the autoencoder's factor."""
        size = (view.image.height, view.image.width)
        mask = None
        if view.mask is not None:
            small = (size[1] // spatial_factor, size[0] // spatial_factor)
            mask = torch.from_numpy(np.array(view.mask.resize(small, Image.Resampling.BOX)))[None]
        return cls(view.captions, size, view.original_size or size, view.crop_corner, mask)


class EncodedView(NamedTuple):
    """A view in latents, on the CPU.

    Attributes:
        info: its metadata.
        posterior: mean and standard deviation of its latents, float16 [2, C, h, w].
        cond: the same for its conditioning image, or its pixels, uint8 [3, H, W]; None if nothing is stored.
    """

    info: ViewInfo
    posterior: Tensor
    cond: Tensor | None


class ViewEncoder:
    """An autoencoder's encoder, on its device."""

    def __init__(self, encoder: ImageEncoder, device: torch.device) -> None:
        self.config = encoder.config
        self._encoder = encoder
        self._device = device

    @torch.no_grad()
    def encode(self, images: Sequence[Image.Image]) -> list[Tensor]:
        """Mean and standard deviation of the latents of images of one size: float16 [2, C, h, w] each, on the CPU."""
        most = batch_limit(images[0].size)
        rows: list[Tensor] = []
        for start in range(0, len(images), most):
            pixels = to_tensor(images[start : start + most]).to(self._device)  # [B, 3, H, W] in -1..1
            # Half precision may overflow in an encoder.
            with torch.autocast(self._device.type, enabled=False):
                posterior = self._encoder(pixels)
            both = torch.stack([posterior.mean, (0.5 * posterior.logvar).exp()], dim=1)  # [B, 2, C, h, w]
            # contiguous: convolutions pass on the channels_last of their kernels.
            rows += both.half().cpu().contiguous().unbind()
        return rows


class ShapeOnlyEncoder(ViewEncoder):
    """Computes nothing: the latents are zeros, of the right shapes."""

    def encode(self, images: Sequence[Image.Image]) -> list[Tensor]:
        """As ViewEncoder.encode, but zeros."""
        channels, factor = self.config.latent_channels, self.config.spatial_factor
        sizes = [(image.height // factor, image.width // factor) for image in images]
        return [torch.zeros(2, channels, *size, dtype=torch.float16) for size in sizes]


def batch_limit(size: tuple[int, int]) -> int:
    """How many images of a size are encoded at once."""
    return max(1, min(ENCODING_BATCH, ENCODING_PIXELS // (size[0] * size[1])))


def pixels_of(image: Image.Image) -> Tensor:
    """An RGB image as uint8 [3, H, W]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def cond_image(view: Sample) -> Image.Image:
    """The conditioning image `before` of a view.

    Raises:
        DatasetError: there is none.
    """
    if view.before is None:
        raise DatasetError(
            "an image has no image `before` its edit, which this model requires; add before_file_name to each image"
        )
    return view.before


@dataclass(frozen=True)
class LatentBatch:
    """The encoded views of one batch, all of one size, on the CPU, and what is drawn for them.

    Attributes:
        plan: which samples these are; all randomness follows from it.
        views: one for each sample.
        change_rngs: for each sample, a generator in the state in which the source's `change` received it.
    """

    plan: BatchIndices
    views: list[EncodedView]
    change_rngs: list[random.Random]

    def latents(self) -> Tensor:
        """A draw from the posterior of each view, float32 [B, C, h, w]: mean + std * noise."""
        mean, std = torch.stack([view.posterior for view in self.views]).float().unbind(1)
        return mean + std * self.plan.noise(mean.shape[1:], "posterior")

    def cond_latents(self) -> Tensor:
        """A draw from the posterior of each conditioning image, float32 [B, C, h, w]."""
        mean, std = torch.stack(self._conds()).float().unbind(1)
        return mean + std * self.plan.noise(mean.shape[1:], "shown posterior")

    def cond_means(self) -> Tensor:
        """The mean of the latents of each conditioning image, float32 [B, C, h, w]."""
        return torch.stack([row[0] for row in self._conds()]).float()

    def cond_pixels(self) -> Tensor:
        """The conditioning images, float32 [B, 3, H, W] in -1..1."""
        return torch.stack(self._conds()).float() / 127.5 - 1.0

    def captions(self, dropout: float) -> list[str]:
        """A caption for each sample, empty at the rate of `dropout` (classifier-free guidance, arXiv:2207.12598)."""
        captions = []
        for view, rng in zip(self.views, self.plan.rngs("caption"), strict=True):
            dropped = rng.random() < dropout
            captions.append("" if dropped else view.info.captions.draw(rng))
        return captions

    def masks(self) -> Tensor:
        """The weight of each place in the loss: float32 [B, 1, h, w] in 0..1; 1 for a view without a mask."""
        masks = [view.info.mask for view in self.views]
        everywhere = torch.full((1, *self.views[0].posterior.shape[-2:]), 255, dtype=torch.uint8)
        return torch.stack([everywhere if mask is None else mask for mask in masks]).float() / 255

    def time_ids(self) -> Tensor:
        """SDXL's time ids, float32 [B, 6]: height and width of the original, top and left of the crop, the view's size.

        arXiv:2307.01952, section 2.2, in the order of diffusers.
        """
        infos = [view.info for view in self.views]
        rows = [(*info.original_size, *info.crop_corner, *info.size) for info in infos]
        return torch.tensor(rows, dtype=torch.float32)

    def _conds(self) -> list[Tensor]:
        return [view.cond for view in self.views if view.cond is not None]


class LatentDataset(ABC):
    """The views of a source in latents."""

    @property
    @abstractmethod
    def captions(self) -> Set[str] | None:
        """Every caption that a batch can have; None if they are unknown, or shuffled."""

    def prefetch(self, plan: BatchIndices) -> list[Sample] | None:
        """What a data loader process draws for `batch`; None where that needs no autoencoder."""
        return None

    @abstractmethod
    def batch(self, plan: BatchIndices, views: list[Sample] | None = None) -> LatentBatch:
        """The encoded views of a batch; `views` are those that `prefetch` has drawn, if any."""


class OnTheFlyLatents(LatentDataset):
    """Views that are drawn and encoded when a batch needs them; nothing is stored, on disk or in memory.

    Data loader processes draw the views and leave the encoding to the training process: they may not use an
    accelerator, and on a CPU they have one thread, with which an encoder rounds differently.
    """

    def __init__(self, source: ViewSource, encoder: ViewEncoder, cond: CondKind) -> None:
        self._source = source
        self._encoder = encoder
        self._cond: CondKind = cond

    @property
    def captions(self) -> Set[str] | None:
        if not self._source.per_item or self._source.shuffles_captions:
            return None
        return {"", *self._source.data.captions()}

    def prefetch(self, plan: BatchIndices) -> list[Sample] | None:
        return self._source.views(plan)

    def batch(self, plan: BatchIndices, views: list[Sample] | None = None) -> LatentBatch:
        views = self._source.views(plan) if views is None else views
        factor = self._encoder.config.spatial_factor
        infos = [ViewInfo.of(view, factor) for view in views]
        posteriors = self._encoder.encode([view.image for view in views])
        conds: Sequence[Tensor | None] = [None] * len(views)
        if self._cond == "latents":
            conds = self._encoder.encode([cond_image(view) for view in views])
        elif self._cond == "pixels":
            conds = [pixels_of(cond_image(view)) for view in views]
        encoded = [EncodedView(*row) for row in zip(infos, posteriors, conds, strict=True)]
        return LatentBatch(plan, encoded, self._source.change_rngs(plan))
