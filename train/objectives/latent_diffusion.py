"""The training loss of a latent diffusion model (arXiv:2112.10752, eq. 3), shared by all tasks that train a UNet."""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Mapping, Set
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from latentgen.diffusion.prediction import add_noise, target
from latentgen.diffusion.scheduler import Scheduler
from latentgen.errors import ConfigError
from latentgen.models.pixels import ImageDecoder, ImageEncoder
from latentgen.models.text import Conditioning, TextEncoder
from latentgen.models.unet import UNet
from latentgen.pipelines.base import Pipeline
from latentgen.pipelines.load_save import default_guidance_scale_of
from latentgen.train.config import DiffusionTask, LatentLoss
from latentgen.train.data import BatchIndices, CaptionedDataset, Sample
from latentgen.train.host_memory import page_out
from latentgen.train.methods.base import AnyPipeline
from latentgen.train.objectives.base import Loss, Objective, Preflight
from latentgen.train.objectives.latent_cache import encode_views
from latentgen.train.objectives.latents import (
    CondKind,
    LatentBatch,
    LatentDataset,
    OnTheFlyLatents,
    ShapeOnlyEncoder,
    ViewSource,
)
from latentgen.train.objectives.losses import (
    mean_loss,
    middles,
    sample_errors,
    spread_timesteps,
    training_noise,
    training_scheduler,
)
from latentgen.train.objectives.text_conditioning import CaptionCache, TextConditioner

# Up to this many latent pixels, all attention scores of a batch are cheap to hold.
SMALL_LATENTS = 32 * 32
# The memory that the conditioning of all captions may take.
CAPTION_BYTES = 4 * 2**30
AnyTask = TypeVar("AnyTask", bound=DiffusionTask)


class LatentObjective(Objective, Generic[AnyTask]):
    """The error of a UNet's prediction at random noise levels, in the latents of a pretrained autoencoder or on pixels.

    Subclasses differ in what else the UNet is conditioned on. Images are encoded once: `views_per_image` random views
    of every item, stored as the mean and standard deviation of their latents; or, with 0, in every step. Captions are
    drawn in every step, and left empty at the rate of `caption_dropout`, which trains the unconditional prediction of
    classifier-free guidance (arXiv:2207.12598).

    A text encoder that is not trained encodes each distinct caption once, when the images are encoded, and is not a
    child of this module: it stays on the CPU, for validation images and for the trained model. It is a child, and
    encodes in every step, if it is trained, or if the captions are not known in advance: `views_per_image` is 0, they
    are shuffled, or they are too many for memory and there is no `cache_dir`.

    Args:
        task: what the recipe says.
        data: the captioned images.
        scheduler: of the recipe or the checkpoint.
        seed: the run's seed, which determines the cached views.
        device: where images are encoded; the objective itself stays on the CPU.

    Attributes:
        scheduler: the noise schedule and prediction type of the training.
        unet: the network that is trained.
        text_encoder: a child only if it is trained as well, or encodes in every step.
    """

    unet: UNet
    text_encoder: nn.Module
    _cond_kind: CondKind = "none"  # what is stored of the conditioning image of each view
    _text: TextEncoder
    _conditioner: TextConditioner
    _latents: LatentDataset
    # In a tuple, so that the pretrained autoencoder is not a child.
    _vae: tuple[ImageEncoder, ImageDecoder]

    def __init__(
        self, task: AnyTask, data: CaptionedDataset, scheduler: Scheduler, *, seed: int, device: torch.device
    ) -> None:
        super().__init__(data, views=max(1, task.views_per_image))
        self.task = task
        self.scheduler = training_scheduler(scheduler, task.loss)
        self._seed = seed
        self._device = device

    def forward(self, *batch: Tensor) -> Loss:
        """The mean error of the prediction; its subset is the samples at the noisier half of the timesteps."""
        latents, noise, timesteps, *rest = batch  # [B, C, h, w], [B, C, h, w], [B]
        loss = self.task.loss
        with attention_kernels(latents):
            # Encode the captions, unless they were encoded before: context [B, S, D].
            text = self._conditioner.conditioning(rest)
            input_noise = rest.pop(0) if loss.input_perturbation else noise
            mask = rest.pop(0) if loss.masked else None
            # Add noise: z_t = alpha_t z_0 + sigma_t noise (arXiv:2006.11239, eq. 4).
            level = self.scheduler.schedule.batch(timesteps)
            noisy = add_noise(latents, input_noise, level)
            # Predict the noise, v or z_0, as the scheduler's prediction type says.
            output = self._predict(noisy, timesteps, text, *rest)
        # Compare with the target: a weighted error for each sample, [B].
        errors = sample_errors(output, latents, noise, level, self.scheduler, loss, mask)
        return mean_loss(errors, level, self.scheduler)

    def _predict(self, noisy: Tensor, timesteps: Tensor, text: Conditioning, *cond: Tensor) -> Tensor:
        """The UNet's output for noisy latents [B, C, h, w]; `cond` is what `_cond_tensors` has returned."""
        return self.unet(torch.cat([noisy, *cond], dim=1), timesteps, text.context)

    def prefetch(self, plan: BatchIndices) -> list[Sample] | None:
        """The views, if they are encoded in every step: by the autoencoder of the process that trains."""
        return self._latents.prefetch(plan)

    def batch(self, plan: BatchIndices, views: list[Sample] | None = None) -> tuple[Tensor, ...]:
        """The inputs of `forward`, on the CPU.

        Latents and noise [B, C, h, w], timesteps [B], then those of TextConditioner; with `input_perturbation` the
        noise of the UNet's input [B, C, h, w]; with `masked` the masks [B, 1, h, w]; and what a subclass conditions on.
        """
        encoded = self._latents.batch(plan, views)
        loss, schedule = self.task.loss, self.scheduler.schedule
        latents = encoded.latents()
        noise = training_noise(plan, latents.shape[1:], loss)
        timesteps = spread_timesteps(plan, schedule.num_train_timesteps, self.task.timestep_shift)
        optional = []
        if loss.input_perturbation:
            # arXiv:2301.11706, algorithm 1
            more = plan.noise(noise.shape[1:], "input perturbation")
            optional.append(noise + loss.input_perturbation * more)
        if loss.masked:
            optional.append(encoded.masks())
        text = self._conditioner.tensors(self._captions(encoded))
        return latents, noise, timesteps, *text, *optional, *self._cond_tensors(encoded)

    def _captions(self, encoded: LatentBatch) -> list[str]:
        """A caption for each sample."""
        return encoded.captions(self.task.caption_dropout)

    def _cond_tensors(self, encoded: LatentBatch) -> tuple[Tensor, ...]:
        """What the UNet is conditioned on besides the captions."""
        return ()

    def train(self, mode: bool = True) -> Self:
        """Switch dropout on or off; a text encoder that is not trained never uses it."""
        super().train(mode)
        if not self._conditioner.trains:
            self._text.module.eval()
        return self

    def save(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write the whole pipeline in the diffusers layout, in float16 if the recipe says so."""
        self.load_state_dict(dict(weights))
        dtype = torch.float16 if self.task.save_half else torch.float32
        nn.ModuleList([self.unet, self._text.module, *self._vae]).to(dtype)
        self.pipeline().save_pretrained(folder)

    @abstractmethod
    def pipeline(self) -> Pipeline:
        """The pipeline that generates images with the networks as they are.

        Raises:
            ConfigError: it cannot use the recipe's UNet.
        """

    def for_validation(self, data: CaptionedDataset, seed: int) -> Self:
        """As Objective.for_validation; no captions are dropped, and the loss is the plain one."""
        plain = {"caption_dropout": 0.0, "views_per_image": 1, "loss": LatentLoss()}
        return self._with_data(data, seed, plain)

    def _with_data(self, data: CaptionedDataset, seed: int, changes: Mapping[str, Any]) -> Self:
        """This objective with other images, encoded now, and changes to its task; the networks are shared."""
        other = super().for_validation(data, seed)
        other._seed = seed
        other.task = self.task.model_copy(update=dict(changes))
        other._encode_images()
        if (captions := other._latents.captions) is not None:
            other._conditioner.add(captions)
        return other

    def validation_loss(self, plan: BatchIndices, timesteps: int) -> Loss:
        """The plain mean squared error at the middles of `timesteps` equal parts of the schedule, and their mean."""
        device = next(self.parameters()).device
        # As in training, where batches are made without autocast.
        with torch.autocast(device.type, enabled=False):
            batch = self.batch(plan)
        latents, noise, _, *rest = (tensor.to(device) for tensor in batch)
        text = self._conditioner.conditioning(rest)
        parts = {}
        for timestep in middles(self.scheduler.schedule.num_train_timesteps, timesteps):
            at = torch.full((len(latents),), timestep, device=device)
            level = self.scheduler.schedule.batch(at)
            output = self._predict(add_noise(latents, noise, level), at, text, *rest)
            expected = target(latents, noise, level, self.scheduler.prediction_type)
            parts[f"timestep {timestep}"] = F.mse_loss(output.float(), expected)
        return Loss(torch.stack(list(parts.values())).mean(), parts)

    def _preflight(self, preflight: Preflight | None) -> None:
        """Find what is wrong with a recipe before `_prepare`, which may take hours.

        Raises:
            ConfigError: the loss is masked, and no image has a mask.
        """
        source = self._source()
        if self.task.loss.masked and source.per_item and not _has_masks(source.data):
            raise ConfigError(
                "task.loss.masked is true, but no image of the training set has a mask; add masks, or leave it out"
            )
        if preflight is None:
            return
        encoder = ShapeOnlyEncoder(self._vae[0], torch.device("cpu"))
        self._latents = OnTheFlyLatents(source, encoder, self._cond_kind)
        # Without `cache_dir`, to which all processes would have to add the same captions.
        self._choose_conditioner(None)
        preflight(self)

    def _prepare(self) -> None:
        """Encode the images, and their captions where that can be done once."""
        self._encode_images()
        page_out(nn.ModuleList(self._vae))
        captions = self._choose_conditioner(self.task.cache_dir)
        self._conditioner.add(captions)

    def _choose_conditioner(self, cache_dir: Path | None) -> Set[str]:
        """Set up the conditioning on captions: encoded once, or in every step by the child `text_encoder`.

        Returns:
            the captions to encode before the first step.
        """
        self._conditioner = TextConditioner(self._text)
        self._modules.pop("text_encoder", None)
        captions = self._latents.captions
        needed = 0 if captions is None else len(captions) * self._text.window * self._text.context_width * 4
        too_many = self.task.cache_dir is None and needed > CAPTION_BYTES
        if self._conditioner.trains or captions is None or too_many:
            self.text_encoder = self._text.module
            return set()
        self._conditioner = TextConditioner(self._text, CaptionCache(self._text, self._device, cache_dir))
        return captions

    def _encode_images(self) -> None:
        source, cache_dir = self._source(), self.task.cache_dir
        self._latents = encode_views(
            self._vae[0], self._device, source, cond=self._cond_kind, cache_dir=cache_dir
        )

    def _source(self) -> ViewSource:
        """The views to encode: by default those of the images, unchanged."""
        return ViewSource(self._data, self.task.views_per_image, self._seed)

    def _pipeline_of(self, kind: type[AnyPipeline], diffusers_class: str, **own: Any) -> AnyPipeline:
        """A pipeline of the networks and the pretrained autoencoder, with fields of its own."""
        encoder, decoder = self._vae
        scale = self.task.guidance_scale
        return kind(
            self.unet,
            decoder,
            self._text,
            self.scheduler,
            load_encoder=lambda: encoder,
            default_guidance_scale=default_guidance_scale_of(diffusers_class) if scale is None else scale,
            **own,
        )


def attention_kernels(latents: Tensor) -> AbstractContextManager[Any]:
    """On a CPU the backward pass of fused attention is slow: for small latents use plain matrix products.

    On the emoji recipe the whole backward pass takes 0.68x the time.
    """
    if latents.device.type == "cpu" and latents.shape[-2] * latents.shape[-1] <= SMALL_LATENTS:
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


def _has_masks(data: CaptionedDataset) -> bool:
    """Whether any image has a mask; images are read up to the first that does."""
    return any(data.sample(item, random.Random(0)).mask is not None for item in range(len(data)))
