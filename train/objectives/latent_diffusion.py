"""What the objectives of diffusion in the latents of a finished autoencoder share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from latentgen.checkpoints.folder import CheckpointFolder
from latentgen.diffusion.prediction import add_noise, target
from latentgen.diffusion.schedule import BatchNoiseLevel
from latentgen.diffusion.scheduler import Scheduler
from latentgen.errors import ConfigError
from latentgen.models.pixels import ImageDecoder, ImageEncoder, PixelConfig, PixelDecoder, PixelEncoder
from latentgen.models.text import CLIPText
from latentgen.models.unet import UNet
from latentgen.models.unet_config import UNetConfig
from latentgen.models.vae import VAEConfig
from latentgen.pipelines.base import Pipeline
from latentgen.pipelines.loading import (
    Placement,
    load_decoder,
    load_encoder,
    load_text_encoder,
    usual_guidance_scale,
)
from latentgen.train.config import DiffusionTask
from latentgen.train.data import BatchPlan, CaptionedImages, Captions, View, sample_rng, to_tensor
from latentgen.train.objectives.base import Loss, Objective

ENCODING_BATCH = 32
# Pixels of latents up to which all attention scores of a batch are cheap to hold.
SMALL_LATENTS = 32 * 32
_ON_CPU = Placement(torch.float32, torch.device("cpu"))
AnyTask = TypeVar("AnyTask", bound=DiffusionTask)


class EncodedViews(NamedTuple):
    """Views of images, encoded once: mean and standard deviation of their latents, and what each may be called.

    The tensors are float16 [views, C, h, w], on the CPU.
    """

    means: Tensor
    stds: Tensor
    captions: Sequence[Captions]

    def latents(self, plan: BatchPlan) -> Tensor:
        """A draw from the posterior of each sample, float32 [B, C, h, w]."""
        items = torch.tensor(plan.items)
        mean, std = self.means[items].float(), self.stds[items].float()
        return mean + std * plan.noise(mean.shape[1:], "posterior")

    def draw_captions(self, plan: BatchPlan, dropout: float) -> list[str]:
        """A caption for each sample, left empty at the rate of `dropout` (arXiv:2207.12598)."""
        captions = []
        for item, rng in zip(plan.items, plan.rngs("caption"), strict=True):
            dropped = rng.random() < dropout
            captions.append("" if dropped else self.captions[item].draw(rng))
        return captions


class LatentObjective(Objective, Generic[AnyTask]):
    """The error of a UNet's prediction at random noise levels, in the latents of a finished autoencoder or on pixels.

    What is shown to the UNet beside the noisy latents makes the subclasses. Images are encoded once: `cached_views`
    random views of every item, kept as the mean and standard deviation of their latents. Captions are drawn anew each
    time, and left out at the rate of `caption_dropout`, which teaches the unconditional prediction of classifier-free
    guidance (arXiv:2207.12598).

    Attributes:
        task: what the recipe says.
        scheduler: its noise schedule and prediction type.
        unet: what is trained.
        text_encoder: is trained as well, or stays as it is.
    """

    unet: UNet
    text_encoder: nn.Module
    _text: CLIPText
    _views: EncodedViews
    # In a tuple, so that the finished autoencoder is no part of what is trained.
    _vae: tuple[ImageEncoder, ImageDecoder]

    def __init__(
        self, task: AnyTask, data: CaptionedImages, device: torch.device, scheduler: Scheduler
    ) -> None:
        super().__init__()
        self.task = task
        # On a CPU the small convolutions of a latent UNet learn faster so.
        self.memory_format = torch.contiguous_format if device.type == "cpu" else torch.channels_last
        self.scheduler = scheduler
        self.item_count = len(data) * task.cached_views

    def batch(self, plan: BatchPlan) -> tuple[Tensor, ...]:
        """Latents and noise [B, C, h, w], timesteps [B] and token ids [B, chunks, window]."""
        latents = self._views.latents(plan)
        count = self.scheduler.schedule.num_train_timesteps
        timesteps = spread_timesteps(plan, count, self.task.timestep_shift)
        return latents, plan.noise(latents.shape[1:], "noise"), timesteps, self._tokens(plan)

    def _tokens(self, plan: BatchPlan) -> Tensor:
        """Token ids [B, chunks, window] of a caption for each sample."""
        return self._text.tokenize(self._views.draw_captions(plan, self.task.caption_dropout))

    def forward(self, *batch: Tensor) -> Loss:
        """The mean squared error of the prediction; its part is the same at the noisier half of the timesteps."""
        latents, noise, timesteps, tokens, *shown = batch
        level = self.scheduler.schedule.batch(timesteps)
        with attention_kernels(latents):
            output = self._predict(add_noise(latents, noise, level), timesteps, tokens, *shown)
        return prediction_loss(output, latents, noise, level, self.scheduler)

    def _predict(self, sample: Tensor, timesteps: Tensor, tokens: Tensor, *shown: Tensor) -> Tensor:
        """The UNet's output for noisy latents and token ids; `shown` is what a batch holds besides."""
        return self._output(sample, timesteps, self._text.encode_tokens(tokens).context, *shown)

    def _output(self, sample: Tensor, timesteps: Tensor, context: Tensor, *shown: Tensor) -> Tensor:
        """The UNet's output for noisy latents; `shown` is what a batch holds besides."""
        return self.unet(torch.cat([sample, *shown], dim=1), timesteps, context)

    def compile_networks(self) -> None:
        """Compile the UNet, beside which the text encoder takes no time."""
        self.unet.compile()

    def save(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write the whole pipeline in the diffusers layout, in float16 if the recipe says so."""
        self.load_state_dict(dict(weights))
        dtype = torch.float16 if self.task.save_half else torch.float32
        nn.ModuleList([self.unet, self.text_encoder, *self._vae]).to(dtype)
        self._pipeline().save_pretrained(folder)

    @abstractmethod
    def _pipeline(self) -> Pipeline:
        """The pipeline that draws with the weights as they are.

        Raises:
            ConfigError: the recipe's UNet is none that it can use.
        """

    def _guidance_scale(self, diffusers_class: str) -> float:
        """What the finished model is guided with where a call names no scale."""
        scale = self.task.guidance_scale
        return usual_guidance_scale(diffusers_class) if scale is None else scale


def load_vae(folder: CheckpointFolder | None) -> tuple[ImageEncoder, ImageDecoder]:
    """A finished autoencoder, or that of pixels for None, in float32 on the CPU."""
    if folder is None:
        return PixelEncoder(), PixelDecoder()
    return load_encoder(folder, _ON_CPU), load_decoder(folder, _ON_CPU)


def finished_text_encoder(folder: Path) -> CLIPText:
    """A text encoder whose weights are not trained, in float32 on the CPU.

    Raises:
        ConfigError: it is SDXL's pair, which no model that is trained here is told.
    """
    joined = load_text_encoder(CheckpointFolder.open(folder), _ON_CPU)
    if not isinstance(joined, CLIPText):
        raise ConfigError("task.text_encoder has two text encoders; name the folder of a model with one")
    return joined


def check_fit(
    unet: UNetConfig,
    vae: VAEConfig | PixelConfig,
    *,
    context_width: int,
    image_size: int,
    in_channels: Mapping[int, str],
) -> None:
    """Refuse configurations of which one cannot take what another gives.

    Args:
        unet: the UNet's.
        vae: the autoencoder's.
        context_width: the channels of what the text encoder gives.
        image_size: the side of the images.
        in_channels: how many channels the UNet can take, and for what.

    Raises:
        ConfigError: listing all that does not fit.
    """
    problems = []
    if unet.in_channels not in in_channels:
        allowed = ", ".join(f"{channels} for {what}" for channels, what in in_channels.items())
        problems.append(f"task.unet.in_channels is {unet.in_channels}; with task.vae it can be {allowed}")
    if unet.out_channels != vae.latent_channels:
        problems.append(
            f"task.unet.out_channels is {unet.out_channels}, but channels of the latents: {vae.latent_channels}"
        )
    if unet.cross_attention_dim != context_width:
        problems.append(
            f"task.unet.cross_attention_dim is {unet.cross_attention_dim}, but hidden_size of task.text_encoder: "
            f"{context_width}"
        )
    if image_size % vae.spatial_factor:
        problems.append(
            f"data.image_size is {image_size}, no multiple of {vae.spatial_factor}, as task.vae needs it"
        )
    if problems:
        raise ConfigError("the parts of the recipe do not fit each other: " + "; ".join(problems))


def fixed_views(data: CaptionedImages, views: int, seed: int) -> Iterator[View]:
    """`views` random views of every item, the same in every process of a run: those of one item follow each other."""
    for item in range(len(data)):
        for number in range(views):
            yield data.view(item, sample_rng(seed, "cached view", item, number))


@torch.no_grad()
def encode_views(
    encoder: ImageEncoder, device: torch.device, views: Iterator[View], count: int
) -> EncodedViews:
    """Encode `count` views on `device`, a few at a time; the encoder, which must be on the CPU, is put back there."""
    encoder.to(device)
    means, stds, captions = [], [], []
    for _ in tqdm(range(0, count, ENCODING_BATCH), desc="encoding the images", mininterval=1.0):
        batch = list(islice(views, ENCODING_BATCH))
        posterior = encoder(to_tensor([view.image for view in batch]).to(device))
        means.append(posterior.mean.half().cpu())
        stds.append((0.5 * posterior.logvar).exp().half().cpu())
        captions += [view.captions for view in batch]
    encoder.cpu()
    # The convolutions would hand on the encoder's channels_last.
    return EncodedViews(torch.cat(means).contiguous(), torch.cat(stds).contiguous(), captions)


def spread_timesteps(plan: BatchPlan, count: int, shift: float) -> Tensor:
    """One of `count` timesteps for each sample, spread evenly over the global batch from a random start.

    Each is uniform by itself; together they cover the schedule, which lowers the variance of the loss
    (arXiv:2107.00630, appendix I.1). `shift` then moves them towards noise (arXiv:2403.03206, eq. 23).
    """
    start = sample_rng(plan.seed, "timestep", plan.step).random()
    places = [(start + sample / plan.batch_size) % 1.0 for sample in plan.samples]
    places = [shift * place / (1 + (shift - 1) * place) for place in places]
    return torch.tensor([int(place * count) for place in places])


def prediction_loss(
    output: Tensor, latents: Tensor, noise: Tensor, level: BatchNoiseLevel, scheduler: Scheduler
) -> Loss:
    """The mean squared error of the prediction; its part is the same at the noisier half of the timesteps."""
    wanted = target(latents, noise, level, scheduler.prediction_type)
    errors = F.mse_loss(output.float(), wanted, reduction="none").mean(dim=(1, 2, 3))
    noisy = 2 * level.timestep >= scheduler.schedule.num_train_timesteps
    return Loss(errors.mean(), {"noisy half": (errors * noisy).sum() / noisy.sum().clamp(min=1)})


def attention_kernels(latents: Tensor) -> AbstractContextManager[Any]:
    """On a CPU the backward pass of fused attention is slow: small latents do better with plain matrix products.

    On the emoji recipe the whole backward pass takes 0.68x the time.
    """
    if latents.device.type == "cpu" and latents.shape[-2] * latents.shape[-1] <= SMALL_LATENTS:
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()
