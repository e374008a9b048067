"""UNets conditioned on an image by channel concatenation: upscaling (arXiv:2106.15282; arXiv:2112.10752, section 4.4),
and undoing a degradation (Palette, arXiv:2111.05826)."""

from __future__ import annotations

import random
from abc import abstractmethod
from pathlib import Path
from typing import TypeVar

import torch
from PIL import Image
from torch import Tensor

from latentgen.checkpoints.folder import CheckpointFolder
from latentgen.diffusion.prediction import add_noise
from latentgen.diffusion.scheduler import Scheduler
from latentgen.errors import ConfigError
from latentgen.models.config import VAEConfig
from latentgen.models.pixels import PixelConfig
from latentgen.models.text import Conditioning
from latentgen.models.unet import UNet
from latentgen.models.unet_config import UNetConfig
from latentgen.pipelines.concat import ConcatImagePipeline
from latentgen.pipelines.upscale import UpscalePipeline, as_channels, low_res_ratio
from latentgen.train.config import PairedTask, UpscaleTask
from latentgen.train.data import CaptionedDataset, Sample
from latentgen.train.objectives.base import Example, Preflight
from latentgen.train.objectives.degradation import DEGRADATIONS, DETERMINISTIC, lower_resolution
from latentgen.train.objectives.latent_diffusion import LatentObjective
from latentgen.train.objectives.latents import LatentBatch, ViewSource
from latentgen.train.objectives.pretrained import check_fit, load_frozen_text_encoder, load_vae, widened_state

ImageTask = TypeVar("ImageTask", UpscaleTask, PairedTask)


class ImageConditionedObjective(LatentObjective[ImageTask]):
    """A UNet that also gets an image made from the training image; autoencoder and text encoder are pretrained, frozen.

    Each cached view has one conditioning image.

    Args:
        task, data, seed, device: see LatentObjective.
        init_from: a folder in the diffusers layout whose UNet to start from, instead of random weights.
        preflight: called with this objective before anything is encoded.

    Raises:
        ConfigError: a configuration is wrong, or they do not fit each other.
        CheckpointError: the autoencoder, the text encoder or `init_from` cannot be used; the subclass says why.
    """

    def __init__(
        self,
        task: ImageTask,
        data: CaptionedDataset,
        *,
        seed: int,
        device: torch.device,
        init_from: Path | None = None,
        preflight: Preflight | None = None,
    ) -> None:
        super().__init__(task, data, Scheduler.from_config(task.scheduler), seed=seed, device=device)
        config = UNetConfig.from_json(task.unet)
        self._vae = load_vae(task.vae)
        vae_config = self._vae[0].config
        self._text = load_frozen_text_encoder(task.text_encoder)
        check_fit(
            config,
            vae_config,
            context_width=self._text.context_width,
            data=data,
            in_channels=self._in_channels(vae_config),
        )
        self.unet = self._build_unet(config, None if init_from is None else CheckpointFolder.open(init_from))
        self.pipeline()  # a recipe whose weights no pipeline can use fails here
        self._preflight(preflight)
        self._prepare()

    @abstractmethod
    def _in_channels(self, vae: VAEConfig | PixelConfig) -> dict[int, str]:
        """How many input channels the UNet can have, and for what."""

    def _build_unet(self, config: UNetConfig, init_from: CheckpointFolder | None) -> UNet:
        unet = UNet(config)
        if init_from is not None:
            init_from.weights("unet").load_into(unet, dtype=torch.float32)
        return unet

    @abstractmethod
    def _cond_image(self, view: Sample, rng: random.Random) -> Image.Image:
        """The image that the UNet is conditioned on to reproduce this view."""

    def _with_cond_image(self, view: Sample, rng: random.Random) -> Sample:
        return view._replace(before=self._cond_image(view, rng))

    def _source(self) -> ViewSource:
        return ViewSource(self._data, self.task.views_per_image, self._seed, self._with_cond_image)

    def validation_example(self, view: Sample, rng: random.Random) -> Example:
        """The caption and the conditioning image."""
        return Example(view.captions.draw(rng), self._cond_image(view, rng), view.image)


class UpscaleObjective(ImageConditionedObjective[UpscaleTask]):
    """A UNet conditioned on the image in low resolution.

    That image is noised as well, to a random level that is also an input (noise conditioning augmentation,
    arXiv:2106.15282), because images that another model has generated differ from downscaled ones.
    """

    _cond_kind = "pixels"

    def _in_channels(self, vae: VAEConfig | PixelConfig) -> dict[int, str]:
        """The channels by the ratio of the low-resolution image's side to that of the latents."""
        enlargement, size = self.task.enlargement, self._data.image_size
        if size % enlargement:
            raise ConfigError(f"data.image_size is {size}, not a multiple of task.enlargement, {enlargement}")
        ratios = [ratio for ratio in range(1, vae.spatial_factor + 1) if vae.spatial_factor % ratio == 0]
        return {
            vae.latent_channels + vae.out_channels * ratio**2: f"x{enlargement * vae.spatial_factor // ratio}"
            for ratio in ratios
        }

    def _cond_image(self, view: Sample, rng: random.Random) -> Image.Image:
        """The image in low resolution, without noise."""
        return lower_resolution(view.image, view.image.width // self.pipeline().scale, rng)

    def _cond_tensors(self, encoded: LatentBatch) -> tuple[Tensor, ...]:
        """The noised low-resolution images [B, 3, H, W] and their noise levels [B]."""
        image, plan = encoded.cond_pixels(), encoded.plan
        # The square favors low levels.
        levels = torch.tensor(
            [int((self.task.max_noise_level + 1) * rng.random() ** 2) for rng in plan.rngs("noise level")]
        )
        noise = plan.noise(image.shape[1:], "low-resolution noise")
        return add_noise(image, noise, self._low_res_scheduler.schedule.batch(levels)), levels

    def _predict(self, noisy: Tensor, timesteps: Tensor, text: Conditioning, *cond: Tensor) -> Tensor:
        image, levels = cond
        ratio = low_res_ratio(self.unet.config, self._vae[1].config)
        channels = as_channels(image, ratio, self.task.enlargement)  # [B, 3 * ratio**2, h, w]
        return self.unet(torch.cat([noisy, channels], dim=1), timesteps, text.context, class_labels=levels)

    @property
    def _low_res_scheduler(self) -> Scheduler:
        return Scheduler.from_config(self.task.low_res_scheduler)

    def pipeline(self) -> UpscalePipeline:
        """See LatentObjective.pipeline."""
        return self._pipeline_of(
            UpscalePipeline,
            "StableDiffusionUpscalePipeline",
            low_res_scheduler=self._low_res_scheduler,
            max_noise_level=self.task.max_noise_level,
            enlargement=self.task.enlargement,
        )


class PairedObjective(ImageConditionedObjective[PairedTask]):
    """A UNet conditioned on the degraded image: the mean of its latents, without the scaling factor.

    `init_from` can be a text-to-image model, of half the input channels: the other half has no effect at first
    (arXiv:2211.09800, section 3.2).
    """

    _cond_kind = "latents"

    def _in_channels(self, vae: VAEConfig | PixelConfig) -> dict[int, str]:
        return {2 * vae.latent_channels: "the latents and those of an image"}

    def _build_unet(self, config: UNetConfig, init_from: CheckpointFolder | None) -> UNet:
        half_channels = config.in_channels // 2
        kernel = None if init_from is None else init_from.weights("unet").tensors().get("conv_in.weight")
        if init_from is None or kernel is None or kernel.shape[1:2] != (half_channels,):
            return super()._build_unet(config, init_from)
        unet = UNet(config)
        with torch.device("meta"):
            half = UNet(config.model_copy(update={"in_channels": half_channels}))
        init_from.weights("unet").load_into(half, dtype=torch.float32)
        unet.load_state_dict(widened_state(half.state_dict(), config.in_channels))
        return unet

    def _source(self) -> ViewSource:
        random_change = self.task.degradation not in DETERMINISTIC
        return ViewSource(
            self._data, self.task.views_per_image, self._seed, self._with_cond_image, random_change
        )

    def _cond_image(self, view: Sample, rng: random.Random) -> Image.Image:
        """The degraded image."""
        return DEGRADATIONS[self.task.degradation](view.image, rng)

    def _cond_tensors(self, encoded: LatentBatch) -> tuple[Tensor, ...]:
        """The degraded images in latents without the scaling factor [B, C, h, w]."""
        return (encoded.cond_means() / self._vae[1].config.scaling_factor,)

    def pipeline(self) -> ConcatImagePipeline:
        """See LatentObjective.pipeline."""
        return self._pipeline_of(ConcatImagePipeline, "StableDiffusionInstructPix2PixPipeline")
