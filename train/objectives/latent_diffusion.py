"""What the objectives of diffusion in the latents of a finished autoencoder share."""

from __future__ import annotations

import copy
import random
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Self, TypeGuard, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from latentgen.diffusion.prediction import add_noise, target
from latentgen.diffusion.scheduler import Scheduler
from latentgen.errors import ConfigError
from latentgen.models.activation_checkpointing import Checkpointing, recomputing_contexts
from latentgen.models.attention import Transformer2DModel
from latentgen.models.layers import ResnetBlock2D
from latentgen.models.pixels import ImageDecoder, ImageEncoder
from latentgen.models.text import Conditioning, TextEncoder
from latentgen.models.unet import UNet
from latentgen.pipelines.base import Pipeline
from latentgen.pipelines.load_save import default_guidance_scale_of
from latentgen.train.config import DiffusionTask, LatentLoss
from latentgen.train.data import BatchIndices, BucketSampler, CaptionedDataset, Sample, sample_rng
from latentgen.train.host_memory import page_out
from latentgen.train.objectives.base import Check, Loss, Objective, unchecked
from latentgen.train.objectives.encoded_views import (
    NO_MASKS,
    EncodedViews,
    FreshViews,
    Shown,
    SketchedViews,
    has_masks,
)
from latentgen.train.objectives.encoding import encode_views
from latentgen.train.objectives.lent import lent
from latentgen.train.objectives.losses import mean_loss, sample_errors, training_scheduler
from latentgen.train.objectives.noising import perturbed_noise, training_noise
from latentgen.train.objectives.standing_in import standing_in
from latentgen.train.objectives.text_cache import TextCache
from latentgen.train.objectives.told_text import ToldText
from latentgen.train.objectives.view_source import ViewSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Pixels of latents up to which all attention scores of a batch are cheap to hold.
SMALL_LATENTS = 32 * 32
# What the conditioning of all captions may take in memory.
CAPTION_BYTES = 4 * 2**30
AnyTask = TypeVar("AnyTask", bound=DiffusionTask)


class LatentObjective(Objective, Generic[AnyTask]):
    """The error of a UNet's prediction at random noise levels, in the latents of a finished autoencoder or on pixels.

    What is shown to the UNet beside the noisy latents makes the subclasses. Images are encoded once: `views_per_image`
    random views of every item, kept as the mean and standard deviation of their latents; or, with 0, in every step.
    Captions are drawn anew each time, and left out at the rate of `caption_dropout`, which teaches the unconditional
    prediction of classifier-free guidance (arXiv:2207.12598).

    A text encoder that does not learn encodes each distinct caption once, as the images are encoded, and is no part of
    this module then: it stays on the CPU, for validation images and for the finished model. It is a part, and encodes
    in every step, if it learns, or if the captions are not known in advance: `views_per_image` is 0, they are
    shuffled, or they are too many for memory and there is no `cache_dir`.

    Attributes:
        task: what the recipe says.
        scheduler: its noise schedule and prediction type.
        unet: what is trained.
        text_encoder: is trained as well, or encodes in every step; else it is no part of this module.
    """

    unet: UNet
    text_encoder: nn.Module
    _text: TextEncoder
    _told: ToldText
    _views: EncodedViews
    # In a tuple, so that the finished autoencoder is no part of what is trained.
    _vae: tuple[ImageEncoder, ImageDecoder]

    def __init__(
        self, task: AnyTask, data: CaptionedDataset, device: torch.device, scheduler: Scheduler
    ) -> None:
        super().__init__()
        self.task = task
        # On a CPU the small convolutions of a latent UNet learn faster so.
        self.memory_format = torch.contiguous_format if device.type == "cpu" else torch.channels_last
        self.scheduler = training_scheduler(scheduler, task.loss)
        self.order = BucketSampler.of(data, views=max(1, task.views_per_image))

    def batch(self, plan: BatchIndices) -> tuple[Tensor, ...]:
        """Latents and noise [B, C, h, w], timesteps [B], what ToldText gives, and what the loss asks for.

        With `input_perturbation` that is the noise that the UNet sees [B, C, h, w], and with `masked` the masks
        [B, 1, h, w]; subclasses append what the UNet is shown.
        """
        latents = self._views.latents(plan)
        count = self.scheduler.schedule.num_train_timesteps
        timesteps = spread_timesteps(plan, count, self.task.timestep_shift)
        loss = self.task.loss
        noise = training_noise(plan, latents.shape[1:], loss)
        asked = []
        if loss.input_perturbation:
            asked.append(perturbed_noise(plan, noise, loss.input_perturbation))
        if loss.masked:
            asked.append(self._views.masks_of(plan))
        return latents, noise, timesteps, *self._told.rows(self._captions(plan)), *asked

    def draw(self, plan: BatchIndices) -> Any:
        """As Objective.draw; the autoencoder encodes where the UNet learns."""
        return self._views.draw(plan) if isinstance(self._views, FreshViews) else super().draw(plan)

    def finish(self, plan: BatchIndices, drawn: Any) -> tuple[Tensor, ...]:
        """As Objective.finish."""
        if not isinstance(self._views, FreshViews):
            return super().finish(plan, drawn)
        self._views.keep(plan, drawn)
        return self.batch(plan)

    def _captions(self, plan: BatchIndices) -> list[str]:
        """A caption for each sample."""
        return self._views.draw_captions(plan, self.task.caption_dropout)

    def train(self, mode: bool = True) -> Self:
        """Switch dropout on or off; text encoders that do not learn go without."""
        super().train(mode)
        if not self._told.learns:
            self._text.module.eval()
        return self

    def forward(self, *batch: Tensor) -> Loss:
        """The mean error of the prediction; its subset is the samples at the noisier half of the timesteps."""
        latents, noise, timesteps, *shown = batch
        loss = self.task.loss
        level = self.scheduler.schedule.batch(timesteps)
        with attention_kernels(latents):
            text = self._told.take(shown)
            seen_noise = shown.pop(0) if loss.input_perturbation else noise
            mask = shown.pop(0) if loss.masked else None
            output = self._predict(add_noise(latents, seen_noise, level), timesteps, text, *shown)
        errors = sample_errors(output, latents, noise, level, self.scheduler, loss, mask)
        return mean_loss(errors, level, self.scheduler)

    def _predict(self, sample: Tensor, timesteps: Tensor, text: Conditioning, *shown: Tensor) -> Tensor:
        """The UNet's output for noisy latents; `shown` is what a batch holds besides."""
        return self.unet(torch.cat([sample, *shown], dim=1), timesteps, text.context)

    def compile_networks(self) -> None:
        """Compile the UNet, beside which the text encoder takes no time."""
        self.unet.compile()

    def checkpointed_layers(self) -> Iterator[nn.Module]:
        """The resnet blocks and transformers of the UNet, and the layers of the text encoder where it is trained."""
        from transformers.modeling_layers import GradientCheckpointingLayer

        yield from (m for m in self.unet.modules() if isinstance(m, ResnetBlock2D | Transformer2DModel))
        if self._told.learns:
            yield from (m for m in self.text_encoder.modules() if isinstance(m, GradientCheckpointingLayer))

    def checkpoint_gradients(self, how: Checkpointing) -> None:
        """Let the UNet, and the text encoder where it is trained, keep less."""
        self.unet.gradient_checkpointing = how
        if self._told.learns:
            for tower in self._text.towers:
                enable_checkpointing(tower.model, how)

    def text_parameters(self) -> Iterable[nn.Parameter]:
        """As Objective.text_parameters."""
        return self._text.module.parameters()

    def save(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write the whole pipeline in the diffusers layout, in float16 if the recipe says so."""
        self.load_state_dict(dict(weights))
        dtype = torch.float16 if self.task.save_half else torch.float32
        nn.ModuleList([self.unet, self._text.module, *self._vae]).to(dtype)
        self._pipeline().save_pretrained(folder)

    def over(self, data: CaptionedDataset, seed: int) -> Self:
        """As Objective.over; captions are not dropped, and the first of several is drawn by the plan."""
        other = copy.copy(self)
        plain = {"caption_dropout": 0.0, "views_per_image": 1, "loss": LatentLoss()}
        other.task = self.task.model_copy(update=plain)
        other.order = BucketSampler.of(data)
        other._see(data, seed, next(self.parameters()).device)
        return other

    def held_out_loss(self, plan: BatchIndices, timesteps: int) -> Loss:
        """The plain mean squared error at the middles of `timesteps` equal parts of the schedule, and their mean."""
        device = next(self.parameters()).device
        # As in training, where batches are made without it.
        with torch.autocast(device.type, enabled=False):
            batch = self.batch(plan)
        latents, noise, _, *shown = (tensor.to(device) for tensor in batch)
        text = self._told.take(shown)
        parts = {}
        for timestep in middles(self.scheduler.schedule.num_train_timesteps, timesteps):
            at = torch.full((len(latents),), timestep, device=device)
            level = self.scheduler.schedule.batch(at)
            output = self._predict(add_noise(latents, noise, level), at, text, *shown)
            wanted = target(latents, noise, level, self.scheduler.prediction_type)
            parts[f"timestep {timestep}"] = F.mse_loss(output.float(), wanted)
        return Loss(torch.stack(list(parts.values())).mean(), parts)

    @contextmanager
    def preview(self, weights: Mapping[str, Tensor]) -> Iterator[Pipeline]:
        """As Objective.preview; for the time of the block decoder and text encoder stand on the device, too."""
        device, backend = next(self.parameters()).device, self.unet.attention_backend
        _, decoder = self._vae
        with standing_in(self, weights), lent(nn.ModuleList([decoder, self._text.module]), device):
            try:
                yield replace(self._pipeline(), device=device)
            finally:
                self.unet.attention_backend = backend

    def _prepare(self, data: CaptionedDataset, seed: int, device: torch.device) -> None:
        """Encode the images, and their captions where that can be done once."""
        self._encode(data, seed, device)
        page_out(nn.ModuleList(self._vae))
        captions = self._views.captions
        if self._encodes_once(captions):
            cache = TextCache(self._text, device=device, cache_dir=self.task.cache_dir)
            self._told = ToldText(self._text, cache)
            self._told.add(captions)

    def _look_ahead(self, data: CaptionedDataset, seed: int, device: torch.device, check: Check) -> None:
        """Find out what is wrong with a recipe before `_prepare`, which may take hours.

        Raises:
            ConfigError: the loss asks for masks, and no image has one.
        """
        source = self._source(data, seed)
        if self.task.loss.masked and source.per_item and not has_masks(data):
            raise ConfigError(NO_MASKS)
        if check is unchecked:
            return
        views = SketchedViews(source, self._vae[0], self._shown_as)
        self._views = views
        if self._encodes_once(views.captions):
            # Not into the folder of the cache, to which all processes must come with the same captions.
            self._told = ToldText(self._text, TextCache(self._text, device=device))
        check(self)

    def _encodes_once(self, captions: Set[str] | None) -> TypeGuard[Set[str]]:
        """Whether these captions are encoded before the first step; else the text encoder joins the networks."""
        self._told = ToldText(self._text)
        self._modules.pop("text_encoder", None)
        needed = 0 if captions is None else len(captions) * self._text.window * self._text.context_width * 4
        too_many = self.task.cache_dir is None and needed > CAPTION_BYTES
        if self._told.learns or captions is None or too_many:
            self.text_encoder = self._text.module
            return False
        return True

    def _see(self, data: CaptionedDataset, seed: int, device: torch.device) -> None:
        """Encode other images as well, and their captions if those of the training set were."""
        self._encode(data, seed, device)
        if self._views.captions is not None:
            self._told.add(self._views.captions)

    def _encode(self, data: CaptionedDataset, seed: int, device: torch.device) -> None:
        """Encode the views of every item, drawn from `seed`, on `device`."""
        source, cache_dir = self._source(data, seed), self.task.cache_dir
        self._views = encode_views(self._vae[0], device, source, shown=self._shown_as, cache_dir=cache_dir)

    def _source(self, data: CaptionedDataset, seed: int) -> ViewSource:
        """The views to encode: `task.views_per_image` of every item, as they are."""
        return ViewSource(data, self.task.views_per_image, seed)

    @property
    def _shown_as(self) -> Shown:
        """What is kept of the image `before` of each view."""
        return "nothing"

    def _with_shown(self, view: Sample, rng: random.Random) -> Sample:
        """A view, as an edit of what the UNet is shown of it."""
        return view._replace(before=self.shown(view, rng))

    @abstractmethod
    def _pipeline(self) -> Pipeline:
        """The pipeline that draws with the weights as they are.

        Raises:
            ConfigError: the recipe's UNet is none that it can use.
        """

    def _guidance_scale(self, diffusers_class: str) -> float:
        """What the finished model is guided with where a call names no scale."""
        scale = self.task.guidance_scale
        return default_guidance_scale_of(diffusers_class) if scale is None else scale


def enable_checkpointing(model: PreTrainedModel, how: Checkpointing) -> None:
    """Let a model of transformers compute the inside of its layers once more in the backward pass, or some of it."""
    kind = {"use_reentrant": False, "context_fn": recomputing_contexts(how)}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=kind)
    else:  # the name in earlier releases
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kind)


def spread_timesteps(plan: BatchIndices, count: int, shift: float) -> Tensor:
    """One of `count` timesteps for each sample, spread evenly over the global batch from a random start.

    Each is uniform by itself; together they cover the schedule, which lowers the variance of the loss
    (arXiv:2107.00630, appendix I.1). `shift` then moves them towards noise (arXiv:2403.03206, eq. 23).
    """
    start = sample_rng(plan.seed, "timestep", plan.step).random()
    places = [(start + sample / plan.batch_size) % 1.0 for sample in plan.samples]
    places = [shift * place / (1 + (shift - 1) * place) for place in places]
    return torch.tensor([int(place * count) for place in places])


def middles(count: int, parts: int) -> list[int]:
    """The middles of `parts` equal parts of `count` timesteps; none comes twice."""
    return sorted({(2 * part + 1) * count // (2 * parts) for part in range(parts)})


def attention_kernels(latents: Tensor) -> AbstractContextManager[Any]:
    """On a CPU the backward pass of fused attention is slow: small latents do better with plain matrix products.

    On the emoji recipe the whole backward pass takes 0.68x the time.
    """
    if latents.device.type == "cpu" and latents.shape[-2] * latents.shape[-1] <= SMALL_LATENTS:
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()
