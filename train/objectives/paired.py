"""The objective of paired image to image by channel concatenation (Palette, arXiv:2111.05826), in latents."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from latentgen.checkpoints.folder import CheckpointFolder
from latentgen.diffusion.scheduler import Scheduler
from latentgen.models.unet import UNet
from latentgen.models.unet_config import UNetConfig
from latentgen.models.vae import VAEConfig
from latentgen.pipelines.paired import PairedImagePipeline
from latentgen.train.config import PairedTask
from latentgen.train.data import BatchPlan, CaptionedImages, View, sample_rng
from latentgen.train.objectives.degradation import DEGRADATIONS
from latentgen.train.objectives.latent_diffusion import (
    EncodedViews,
    LatentObjective,
    check_fit,
    encode_views,
    finished_text_encoder,
    fixed_views,
    load_vae,
)


class PairedObjective(LatentObjective[PairedTask]):
    """A UNet that is shown the degraded image; the text encoder is a finished one, and stays as it is.

    What it is shown is the mean of the degraded image's latents without the scaling factor, as PairedImagePipeline
    shows it. Each cached view is degraded once.

    Args:
        task: what the recipe says.
        data: the captioned images.
        seed: the run's seed, which the cached views and what is done to them follow.
        device: where the images are encoded; the objective itself stays on the CPU.
        init_from: a folder in the diffusers layout whose UNet to begin with, instead of random weights. One that is
            shown nothing yet, of half the input channels, is given the others.

    Raises:
        ConfigError: a configuration is wrong, or they do not fit each other.
        CheckpointError: the autoencoder, the text encoder or `init_from` cannot be used; the subclass says why.
    """

    def __init__(
        self,
        task: PairedTask,
        data: CaptionedImages,
        *,
        seed: int,
        device: torch.device,
        init_from: Path | None = None,
    ) -> None:
        super().__init__(task, data, device, Scheduler.from_config(task.scheduler))
        config = UNetConfig.from_json(task.unet)
        vae = CheckpointFolder.open(task.vae)
        vae_config = VAEConfig.from_json(vae.config("vae"))
        self._text = finished_text_encoder(task.text_encoder)
        check_fit(
            config,
            vae_config,
            context_width=self._text.context_width,
            image_size=data.image_size,
            in_channels={2 * vae_config.latent_channels: "the latents and those of an image"},
        )
        origin = None if init_from is None else CheckpointFolder.open(init_from)
        self.unet = UNet(config) if origin is None else _load_unet(config, origin)
        self.text_encoder = self._text.model
        self._vae = load_vae(vae)
        # What the weights would be saved in is put together first, so that a recipe of no use fails at once.
        self._pipeline()
        views = self._pairs(fixed_views(data, task.cached_views, seed), seed)
        encoded = encode_views(self._vae[0], device, views, 2 * self.item_count)
        # Of what is shown the mean is enough.
        self._views = EncodedViews(encoded.means[::2], encoded.stds[::2].clone(), encoded.captions[::2])
        self._shown = encoded.means[1::2]
        self._scaling_factor = vae_config.scaling_factor

    def _pairs(self, views: Iterator[View], seed: int) -> Iterator[View]:
        """Each view, and after it what the UNet is shown of it."""
        degrade = DEGRADATIONS[self.task.degradation]
        for number, view in enumerate(views):
            yield view
            yield view._replace(image=degrade(view.image, sample_rng(seed, "degradation", number)))

    def batch(self, plan: BatchPlan) -> tuple[Tensor, ...]:
        """As LatentObjective.batch, and the degraded images in latents without the scaling factor [B, C, h, w]."""
        return *super().batch(plan), self._shown[list(plan.items)].float() / self._scaling_factor

    def _pipeline(self) -> PairedImagePipeline:
        encoder, decoder = self._vae
        return PairedImagePipeline(
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
