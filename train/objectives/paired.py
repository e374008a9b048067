"""The objective of paired image to image by channel concatenation (Palette, arXiv:2111.05826), in latents."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from latentgen.checkpoints.folder import CheckpointFolder
from latentgen.diffusion.scheduler import Scheduler
from latentgen.models.unet import UNet
from latentgen.models.unet_config import UNetConfig
from latentgen.pipelines.concat import ConcatImagePipeline
from latentgen.train.config import PairedTask
from latentgen.train.data import BatchIndices, CaptionedDataset, Sample
from latentgen.train.objectives.base import Check, unchecked
from latentgen.train.objectives.degradation import DEGRADATIONS, NOT_RANDOM
from latentgen.train.objectives.encoded_views import Shown
from latentgen.train.objectives.finished import check_fit, finished_text_encoder, load_vae, open_vae
from latentgen.train.objectives.latent_diffusion import LatentObjective
from latentgen.train.objectives.view_source import ViewSource


class PairedObjective(LatentObjective[PairedTask]):
    """A UNet that is shown the degraded image; the text encoder is a finished one, and stays as it is.

    What it is shown is the mean of the degraded image's latents without the scaling factor, as ConcatImagePipeline
    shows it. Each cached view is degraded once.

    Args:
        task: what the recipe says.
        data: the captioned images.
        seed: the run's seed, which the cached views and what is done to them follow.
        device: where the images are encoded; the objective itself stays on the CPU.
        init_from: a folder in the diffusers layout whose UNet to begin with, instead of random weights. One that is
            shown nothing yet, of half the input channels, is given the others.
        check: looks at this objective before anything is encoded.

    Raises:
        ConfigError: a configuration is wrong, or they do not fit each other.
        CheckpointError: the autoencoder, the text encoder or `init_from` cannot be used; the subclass says why.
    """

    def __init__(
        self,
        task: PairedTask,
        data: CaptionedDataset,
        *,
        seed: int,
        device: torch.device,
        init_from: Path | None = None,
        check: Check = unchecked,
    ) -> None:
        super().__init__(task, data, device, Scheduler.from_config(task.scheduler))
        config = UNetConfig.from_json(task.unet)
        vae, vae_config = open_vae(task.vae)
        self._text = finished_text_encoder(task.text_encoder)
        check_fit(
            config,
            vae_config,
            context_width=self._text.context_width,
            data=data,
            in_channels={2 * vae_config.latent_channels: "the latents and those of an image"},
        )
        origin = None if init_from is None else CheckpointFolder.open(init_from)
        self.unet = UNet(config) if origin is None else _load_unet(config, origin)
        self._vae = load_vae(vae)
        # What the weights would be saved in is put together first, so that a recipe of no use fails at once.
        self._pipeline()
        self._scaling_factor = vae_config.scaling_factor
        self._look_ahead(data, seed, device, check)
        self._prepare(data, seed, device)

    def _source(self, data: CaptionedDataset, seed: int) -> ViewSource:
        random_change = self.task.degradation not in NOT_RANDOM
        return ViewSource(data, self.task.views_per_image, seed, self._with_shown, random_change)

    @property
    def _shown_as(self) -> Shown:
        return "latents"

    @property
    def remakes(self) -> bool:
        return True

    def shown(self, view: Sample, rng: random.Random) -> Image.Image:
        """The degraded image."""
        return DEGRADATIONS[self.task.degradation](view.image, rng)

    def batch(self, plan: BatchIndices) -> tuple[Tensor, ...]:
        """As LatentObjective.batch, and the degraded images in latents without the scaling factor [B, C, h, w]."""
        return *super().batch(plan), self._views.shown(plan).float() / self._scaling_factor

    def _pipeline(self) -> ConcatImagePipeline:
        encoder, decoder = self._vae
        return ConcatImagePipeline(
            self.unet,
            decoder,
            self._text,
            self.scheduler,
            load_encoder=lambda: encoder,
            default_guidance_scale=self._guidance_scale("StableDiffusionInstructPix2PixPipeline"),
        )


def _load_unet(config: UNetConfig, origin: CheckpointFolder) -> UNet:
    """The UNet of `origin`, in float32.

    One of half the input channels gets the others, which at first count for nothing (arXiv:2211.09800, section 3.2).
    """
    weights = origin.weights("unet")
    kernel = weights.tensors().get("conv_in.weight")
    half_channels = config.in_channels // 2
    unet = UNet(config)
    if kernel is None or kernel.shape[1:2] != (half_channels,):
        weights.load_into(unet, dtype=torch.float32)
        return unet
    with torch.device("meta"):
        half = UNet(config.model_copy(update={"in_channels": half_channels}))
    weights.load_into(half, dtype=torch.float32)
    state = half.state_dict()
    known = state["conv_in.weight"]
    state["conv_in.weight"] = torch.cat([known, torch.zeros_like(known)], dim=1)
    unet.load_state_dict(state)
    return unet
