"""The objective of low-resolution-conditioned diffusion (arXiv:2106.15282; arXiv:2112.10752, section 4.4)."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor, nn

from latentgen.checkpoints.folder import CheckpointFolder
from latentgen.checkpoints.weights import load_weights
from latentgen.diffusion.prediction import add_noise
from latentgen.diffusion.scheduler import Scheduler
from latentgen.errors import ConfigError
from latentgen.models.text import CLIPText
from latentgen.models.unet import UNet
from latentgen.models.unet_config import UNetConfig
from latentgen.models.vae import VAEConfig
from latentgen.pipelines.loading import (
    Placement,
    load_decoder,
    load_encoder,
    load_text_encoder,
    usual_guidance_scale,
)
from latentgen.pipelines.upscale import UpscalePipeline, low_res_ratio
from latentgen.train.config import UpscaleTask
from latentgen.train.data import BatchPlan, CaptionedImages, View, sample_rng
from latentgen.train.latent_diffusion import (
    attention_kernels,
    encode_views,
    fixed_views,
    prediction_loss,
    spread_timesteps,
)
from latentgen.train.objective import Loss, Objective

KERNELS = (
    Image.Resampling.BOX,
    Image.Resampling.BILINEAR,
    Image.Resampling.BICUBIC,
    Image.Resampling.LANCZOS,
)
BLURRED = 0.2
# Standard deviation of the strongest blur, in pixels of the low-resolution image.
MAX_BLUR = 0.4


class UpscaleObjective(Objective):
    """The error of the UNet's prediction at random noise levels, when it is shown the image in low resolution.

    What it is shown is noised as well, to a random level that it is told (noise conditioning augmentation,
    arXiv:2106.15282): images that another model has made are not quite like those that are scaled down. Images are
    encoded once, as in TextToImageObjective; the text encoder is a finished one, and stays as it is.

    Args:
        task: what the recipe says.
        data: the captioned images.
        seed: the run's seed, which the cached views follow.
        device: where the images are encoded; the objective itself stays on the CPU.
        init_from: a folder in the diffusers layout whose UNet to begin with, instead of random weights.

    Raises:
        ConfigError: a configuration is wrong, or they do not fit each other.
        CheckpointError: the autoencoder, the text encoder or `init_from` cannot be used; the subclass says why.
    """

    def __init__(
        self,
        task: UpscaleTask,
        data: CaptionedImages,
        *,
        seed: int,
        device: torch.device,
        init_from: Path | None = None,
    ) -> None:
        super().__init__()
        self.task = task
        # As in TextToImageObjective.
        self.memory_format = torch.contiguous_format if device.type == "cpu" else torch.channels_last
        self.scheduler = Scheduler.from_config(task.scheduler)
        self.low_res_scheduler = Scheduler.from_config(task.low_res_scheduler)
        config = UNetConfig.from_json(task.unet)
        vae = CheckpointFolder.open(task.vae)
        vae_config = VAEConfig.from_json(vae.config("vae"))
        self._text = _text_encoder(task.text_encoder)
        _check_fit(config, vae_config, self._text, data.image_size)
        self._ratio = low_res_ratio(config, vae_config)
        self.unet = UNet(config)
        if init_from is not None:
            load_weights(
                self.unet, CheckpointFolder.open(init_from).weight_files("unet"), dtype=torch.float32
            )
        self.text_encoder = self._text.model
        placement = Placement(torch.float32, device)
        encoder, decoder = load_encoder(vae, placement), load_decoder(vae, placement)
        # In a tuple, so that the finished autoencoder is no part of what is trained.
        self._vae = (encoder.cpu(), decoder.cpu())
        # What the weights would be saved in is put together first, so that a recipe of no use fails at once.
        self._pipeline()
        self.item_count = len(data) * task.cached_views
        self._low_res: list[Tensor] = []
        side = data.image_size * self._ratio // vae_config.spatial_factor
        views = self._degraded(fixed_views(data, task.cached_views, seed), side, seed)
        self._views = encode_views(encoder.to(device), device, views, self.item_count)
        encoder.cpu()

    def _degraded(self, views: Iterator[View], side: int, seed: int) -> Iterator[View]:
        """Pass views on, and keep each in low resolution: uint8 [3, side, side]."""
        for number, view in enumerate(views):
            low_res = degrade(view.image, side, sample_rng(seed, "degradation", number))
            self._low_res.append(torch.from_numpy(np.array(low_res)).permute(2, 0, 1))
            yield view

    def batch(self, plan: BatchPlan) -> tuple[Tensor, ...]:
        """What the loss is made from.

        Latents and noise [B, C, h, w], timesteps [B], token ids [B, chunks, window], the noised low-resolution images
        [B, 3, H, W] and their levels [B].
        """
        task = self.task
        latents = self._views.latents(plan)
        timesteps = spread_timesteps(plan, self.scheduler.schedule.num_train_timesteps, task.timestep_shift)
        tokens = self._text.tokenize(self._views.draw_captions(plan, task.caption_dropout))
        shown = torch.stack([self._low_res[item] for item in plan.items]).float() / 127.5 - 1.0
        # The square favours low levels: an image that is shown as it is has one level of many.
        levels = torch.tensor(
            [int((task.max_noise_level + 1) * rng.random() ** 2) for rng in plan.rngs("noise level")]
        )
        noise = plan.noise(shown.shape[1:], "low-resolution noise")
        shown = add_noise(shown, noise, self.low_res_scheduler.schedule.batch(levels))
        return latents, plan.noise(latents.shape[1:], "noise"), timesteps, tokens, shown, levels

    def forward(self, *batch: Tensor) -> Loss:
        """The mean squared error of the prediction; its part is the same at the noisier half of the timesteps."""
        latents, noise, timesteps, tokens, shown, levels = batch
        level = self.scheduler.schedule.batch(timesteps)
        sample = torch.cat([add_noise(latents, noise, level), F.pixel_unshuffle(shown, self._ratio)], dim=1)
        with attention_kernels(latents):
            with torch.no_grad():
                context = self._text.encode_tokens(tokens).context
            output = self.unet(sample, timesteps, context, class_labels=levels)
        return prediction_loss(output, latents, noise, level, self.scheduler)

    def compile_networks(self) -> None:
        """Compile the UNet, beside which the text encoder takes no time."""
        self.unet.compile()

    def save(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write the whole pipeline in the diffusers layout, in float16 if the recipe says so."""
        self.load_state_dict(dict(weights))
        dtype = torch.float16 if self.task.save_half else torch.float32
        nn.ModuleList([self.unet, self.text_encoder, *self._vae]).to(dtype)
        self._pipeline().save_pretrained(folder)

    def _pipeline(self) -> UpscalePipeline:
        encoder, decoder = self._vae
        scale = self.task.guidance_scale
        return UpscalePipeline(
            self.unet,
            decoder,
            self._text,
            self.scheduler,
            load_encoder=lambda: encoder,
            default_guidance_scale=(
                usual_guidance_scale("StableDiffusionUpscalePipeline") if scale is None else scale
            ),
            low_res_scheduler=self.low_res_scheduler,
            max_noise_level=self.task.max_noise_level,
        )


def degrade(image: Image.Image, side: int, rng: random.Random) -> Image.Image:
    """The image in low resolution, as cameras and programs make it: a random kernel, sometimes after a slight blur."""
    if rng.random() < BLURRED:
        blur = rng.uniform(0.0, MAX_BLUR) * image.width / side
        image = image.filter(ImageFilter.GaussianBlur(blur))
    return image.resize((side, side), rng.choice(KERNELS))


def _text_encoder(folder: Path) -> CLIPText:
    """A finished text encoder, in float32; its weights are not trained.

    Raises:
        ConfigError: it is SDXL's pair, which upscalers are not told.
    """
    joined = load_text_encoder(CheckpointFolder.open(folder), Placement(torch.float32, torch.device("cpu")))
    if not isinstance(joined, CLIPText):
        raise ConfigError("task.text_encoder has two text encoders; name the folder of a model with one")
    return joined


def _check_fit(unet: UNetConfig, vae: VAEConfig, text: CLIPText, image_size: int) -> None:
    """Refuse configurations of which one cannot take what another gives."""
    ratio = low_res_ratio(unet, vae)
    due = vae.latent_channels + vae.out_channels * ratio**2
    problems = []
    if unet.in_channels != due or vae.spatial_factor % ratio:
        fitting = [r for r in range(1, vae.spatial_factor + 1) if vae.spatial_factor % r == 0]
        scales = ", ".join(
            f"{vae.latent_channels + vae.out_channels * r**2} for x{vae.spatial_factor // r}" for r in fitting
        )
        problems.append(f"task.unet.in_channels is {unet.in_channels}; with task.vae it can be {scales}")
    if unet.out_channels != vae.latent_channels:
        problems.append(
            f"task.unet.out_channels is {unet.out_channels}, but channels of the latents: {vae.latent_channels}"
        )
    if unet.cross_attention_dim != text.context_width:
        problems.append(
            f"task.unet.cross_attention_dim is {unet.cross_attention_dim}, but hidden_size of task.text_encoder: "
            f"{text.context_width}"
        )
    if image_size % vae.spatial_factor:
        problems.append(
            f"data.image_size is {image_size}, no multiple of {vae.spatial_factor}, as task.vae needs it"
        )
    if problems:
        raise ConfigError("the parts of the recipe do not fit each other: " + "; ".join(problems))
