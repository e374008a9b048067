"""The objective of low-resolution-conditioned diffusion (arXiv:2106.15282; arXiv:2112.10752, section 4.4)."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from latentgen.checkpoints.folder import CheckpointFolder
from latentgen.checkpoints.weights import load_weights
from latentgen.diffusion.prediction import add_noise
from latentgen.diffusion.scheduler import Scheduler
from latentgen.errors import ConfigError
from latentgen.models.config import VAEConfig
from latentgen.models.pixels import PixelConfig
from latentgen.models.text import Conditioning
from latentgen.models.unet import UNet
from latentgen.models.unet_config import UNetConfig
from latentgen.pipelines.upscale import UpscalePipeline, as_channels, low_res_ratio
from latentgen.train.config import UpscaleTask
from latentgen.train.data import BatchIndices, CaptionedDataset, Sample
from latentgen.train.objectives.base import Check, unchecked
from latentgen.train.objectives.degradation import lower_resolution
from latentgen.train.objectives.encoded_views import Shown
from latentgen.train.objectives.finished import check_fit, finished_text_encoder, load_vae, open_vae
from latentgen.train.objectives.latent_diffusion import LatentObjective
from latentgen.train.objectives.view_source import ViewSource


class UpscaleObjective(LatentObjective[UpscaleTask]):
    """A UNet that is shown the image in low resolution; the text encoder is a finished one, and stays as it is.

    What it is shown is noised as well, to a random level that it is told (noise conditioning augmentation,
    arXiv:2106.15282): images that another model has made are not quite like those that are scaled down.

    Args:
        task: what the recipe says.
        data: the captioned images.
        seed: the run's seed, which the cached views follow.
        device: where the images are encoded; the objective itself stays on the CPU.
        init_from: a folder in the diffusers layout whose UNet to begin with, instead of random weights.
        check: looks at this objective before anything is encoded.

    Raises:
        ConfigError: a configuration is wrong, or they do not fit each other.
        CheckpointError: the autoencoder, the text encoder or `init_from` cannot be used; the subclass says why.
    """

    def __init__(
        self,
        task: UpscaleTask,
        data: CaptionedDataset,
        *,
        seed: int,
        device: torch.device,
        init_from: Path | None = None,
        check: Check = unchecked,
    ) -> None:
        super().__init__(task, data, device, Scheduler.from_config(task.scheduler))
        self.low_res_scheduler = Scheduler.from_config(task.low_res_scheduler)
        config = UNetConfig.from_json(task.unet)
        vae, vae_config = open_vae(task.vae)
        self._text = finished_text_encoder(task.text_encoder)
        self._ratio = low_res_ratio(config, vae_config)
        check_fit(
            config,
            vae_config,
            context_width=self._text.context_width,
            data=data,
            in_channels=_in_channels(vae_config, task.enlargement),
        )
        if data.image_size % task.enlargement:
            raise ConfigError(
                f"data.image_size is {data.image_size}, no multiple of task.enlargement, {task.enlargement}"
            )
        self.unet = UNet(config)
        if init_from is not None:
            load_weights(
                self.unet, CheckpointFolder.open(init_from).weight_files("unet"), dtype=torch.float32
            )
        self._vae = load_vae(vae)
        # What the weights would be saved in is put together first, so that a recipe of no use fails at once.
        self._scale = self._pipeline().scale
        self._look_ahead(data, seed, device, check)
        self._prepare(data, seed, device)

    def _source(self, data: CaptionedDataset, seed: int) -> ViewSource:
        return ViewSource(data, self.task.views_per_image, seed, self._with_shown)

    @property
    def _shown_as(self) -> Shown:
        return "pixels"

    @property
    def remakes(self) -> bool:
        return True

    def shown(self, view: Sample, rng: random.Random) -> Image.Image:
        """The image in low resolution, without noise."""
        return lower_resolution(view.image, view.image.width // self._scale, rng)

    def batch(self, plan: BatchIndices) -> tuple[Tensor, ...]:
        """As LatentObjective.batch, and the noised low-resolution images [B, 3, H, W] and their levels [B]."""
        shown = self._views.shown(plan).float() / 127.5 - 1.0
        # The square favours low levels: an image that is shown as it is has one level of many.
        levels = torch.tensor(
            [int((self.task.max_noise_level + 1) * rng.random() ** 2) for rng in plan.rngs("noise level")]
        )
        noise = plan.noise(shown.shape[1:], "low-resolution noise")
        shown = add_noise(shown, noise, self.low_res_scheduler.schedule.batch(levels))
        return *super().batch(plan), shown, levels

    def _predict(self, sample: Tensor, timesteps: Tensor, text: Conditioning, *shown: Tensor) -> Tensor:
        image, levels = shown
        channels = as_channels(image, self._ratio, self.task.enlargement)
        return self.unet(torch.cat([sample, channels], dim=1), timesteps, text.context, class_labels=levels)

    def _pipeline(self) -> UpscalePipeline:
        encoder, decoder = self._vae
        return UpscalePipeline(
            self.unet,
            decoder,
            self._text,
            self.scheduler,
            load_encoder=lambda: encoder,
            default_guidance_scale=self._guidance_scale("StableDiffusionUpscalePipeline"),
            low_res_scheduler=self.low_res_scheduler,
            max_noise_level=self.task.max_noise_level,
            enlargement=self.task.enlargement,
        )


def _in_channels(vae: VAEConfig | PixelConfig, enlargement: int) -> dict[int, str]:
    """The channels of UNets that are shown an image in low resolution, by the ratio of its side to the latents'."""
    ratios = [ratio for ratio in range(1, vae.spatial_factor + 1) if vae.spatial_factor % ratio == 0]
    return {
        vae.latent_channels + vae.out_channels * ratio**2: f"x{enlargement * vae.spatial_factor // ratio}"
        for ratio in ratios
    }
