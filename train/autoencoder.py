"""The objective of the KL autoencoder (arXiv:2112.10752, section 3.1)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from latentgen.files import write_json
from latentgen.models.vae import VAEConfig, VAEDecoder, VAEEncoder
from latentgen.train.config import AutoencoderTask
from latentgen.train.data import BatchPlan, CaptionedImages, sample_rng, to_tensor
from latentgen.train.objective import Loss, Objective
from latentgen.weights import save_weights


class AutoencoderObjective(Objective):
    """Reconstruction in pixels and in their differences, and a slight pull of the latents to the standard normal.

    The pixel differences (edges) weigh what the eye sees: a blurred edge costs little in pixels and much in edges.
    """

    def __init__(self, task: AutoencoderTask, data: CaptionedImages) -> None:
        super().__init__()
        self.task = task
        self.data = data
        self.config = VAEConfig.from_json(task.vae)
        self.encoder = VAEEncoder(self.config).requires_grad_(task.train_encoder)
        self.decoder = VAEDecoder(self.config)
        self.item_count = len(data)
        side = data.image_size // self.config.spatial_factor
        self.latent_shape = (self.config.latent_channels, side, side)

    def batch(self, plan: BatchPlan) -> tuple[Tensor, ...]:
        """Images [B, 3, H, W] in -1..1 and the posterior's noise [B, C, h, w]."""
        views = [self.data.view(item, rng) for item, rng in zip(plan.items, plan.rngs("view"), strict=True)]
        return to_tensor([view.image for view in views]), plan.noise(self.latent_shape, "posterior")

    def forward(self, *batch: Tensor) -> Loss:
        """The mean loss; its parts are the pixel and edge errors (mean absolute, on -1..1) and the KL in nats."""
        images, noise = batch
        with torch.set_grad_enabled(self.task.train_encoder and torch.is_grad_enabled()):
            posterior = self.encoder(images)
        error = self.decoder(posterior.sample(noise)).float() - images
        pixels = error.abs().mean()
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        kl = posterior.kl().mean()
        total = pixels + self.task.edge_weight * edges + self.task.kl_weight * kl
        return Loss(total, {"pixels": pixels, "edges": edges, "kl": kl})

    def save(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write `vae/` in float32, its latents brought to unit variance per channel."""
        self.load_state_dict(dict(weights))
        _normalise_latents(self.encoder, self.decoder, self._calibration_images())
        write_json(
            folder / "model_index.json",
            {"_class_name": "AutoencoderKL", "vae": ["diffusers", "AutoencoderKL"]},
        )
        write_json(folder / "vae" / "config.json", self.config.to_json())
        save_weights(
            {**self.encoder.state_dict(), **self.decoder.state_dict()},
            folder / "vae",
            "diffusion_pytorch_model",
        )

    def _calibration_images(self) -> Tensor:
        """As many random views as there are items, but not over a thousand, evenly over the set."""
        count = min(1024, len(self.data))
        items = (round(place * len(self.data) / count) for place in range(count))
        return to_tensor([self.data.view(item, sample_rng(0, "calibration", item)).image for item in items])


@torch.no_grad()
def _normalise_latents(encoder: VAEEncoder, decoder: VAEDecoder, images: Tensor) -> None:
    """Give each latent channel mean 0 and variance 1 over `images`, without changing a reconstruction.

    The affine map is folded into the 1x1 convolutions on either side of the latents, so that one scaling factor
    (arXiv:2112.10752, appendix G) of 1 serves every channel.
    """
    means = torch.cat([encoder(part).mean for part in images.split(32)])
    mean, std = means.mean(dim=(0, 2, 3)), means.std(dim=(0, 2, 3))
    quant, post = encoder.quant_conv, decoder.post_quant_conv
    # post(z) = W z + b = (W * std) z' + (W @ mean + b) for z' = (z - mean) / std
    post.bias.add_(post.weight[:, :, 0, 0] @ mean)
    post.weight.mul_(std[None, :, None, None])
    channels = len(mean)
    quant.weight[:channels].div_(std[:, None, None, None])
    quant.bias[:channels].sub_(mean).div_(std)
    quant.bias[channels:].sub_(2 * std.log())
