"""The objective of the KL autoencoder (arXiv:2112.10752, section 3.1)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor, nn

from latentgen.checkpoints.folder import CheckpointFolder
from latentgen.checkpoints.weights import save_weights
from latentgen.errors import ConfigError
from latentgen.files import write_json
from latentgen.models.config import VAEConfig
from latentgen.models.vae import VAEDecoder, VAEEncoder
from latentgen.pipelines.load_save import WEIGHTS_STEM
from latentgen.train.config import AutoencoderTask
from latentgen.train.data import BatchIndices, CaptionedDataset, Sample, check_sides, sample_rng, to_tensor
from latentgen.train.objectives.base import Loss, Objective

_CALIBRATION_IMAGES = 1024
_CALIBRATION_BATCH = 32


class AutoencoderObjective(Objective):
    """Reconstruction error in pixels and in their differences, and a small KL term towards the standard normal.

    The pixel differences (edges) penalize blur: a blurred edge costs little in pixels and much in edges. `init_from` is
    a folder with a `vae/` whose weights to start from, instead of random ones.

    Raises:
        ConfigError: the VAE's configuration is wrong or does not fit the images.
        CheckpointError: `init_from` cannot be used; the subclass says why.
    """

    def __init__(
        self, task: AutoencoderTask, data: CaptionedDataset, *, init_from: Path | None = None
    ) -> None:
        super().__init__(data)
        self.task = task
        self.config = VAEConfig.from_json(task.vae)
        _check_fit(self.config, data)
        self.encoder = VAEEncoder(self.config)
        self.decoder = VAEDecoder(self.config)
        if init_from is not None:
            weights = CheckpointFolder.open(init_from).weights("vae")
            weights.load_into(self, dtype=torch.float32, rename=_module_name)
        self.encoder.requires_grad_(task.train_encoder)

    def batch(self, plan: BatchIndices, views: list[Sample] | None = None) -> tuple[Tensor, ...]:
        """Images [B, 3, H, W] in -1..1 and the posterior's noise [B, C, h, w]."""
        (images,) = super().batch(plan, views)
        height, width = (side // self.config.spatial_factor for side in images.shape[2:])
        return images, plan.noise((self.config.latent_channels, height, width), "posterior")

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
        """Write `vae/` in float32; latents of a trained encoder are scaled to unit variance per channel."""
        self.load_state_dict(dict(weights))
        if self.task.train_encoder:
            normalize_latents(self.encoder, self.decoder, self._calibration_batches())
        state = {**self.encoder.state_dict(), **self.decoder.state_dict()}
        save_weights(state, folder / "vae", WEIGHTS_STEM)
        write_json(folder / "vae" / "config.json", self.config.to_json())
        index = {"_class_name": "AutoencoderKL", "vae": ["diffusers", "AutoencoderKL"]}
        write_json(folder / "model_index.json", index)

    def _calibration_batches(self) -> Iterator[Tensor]:
        """Random views of up to 1024 items, spread evenly over the set."""
        count = min(_CALIBRATION_IMAGES, len(self._data))
        items = [round(place * len(self._data) / count) for place in range(count)]
        for _, of_one_size in groupby(sorted(items, key=self._data.bucket), key=self._data.bucket):
            alike = list(of_one_size)
            for start in range(0, len(alike), _CALIBRATION_BATCH):
                part = alike[start : start + _CALIBRATION_BATCH]
                yield to_tensor(
                    [self._data.sample(item, sample_rng(0, "calibration", item)).image for item in part]
                )


def _check_fit(config: VAEConfig, data: CaptionedDataset) -> None:
    if config.in_channels != 3 or config.out_channels != 3:
        raise ConfigError(
            f"task.vae: in_channels and out_channels must be 3, not {config.in_channels}, {config.out_channels}"
        )
    check_sides(data, config.spatial_factor)


def _module_name(key: str) -> str:
    """The name in the objective of a VAE's weight."""
    return f"{'decoder' if key.startswith(('decoder.', 'post_quant_conv.')) else 'encoder'}.{key}"


@torch.no_grad()
def normalize_latents(encoder: VAEEncoder, decoder: VAEDecoder, batches: Iterator[Tensor]) -> None:
    """Give each latent channel mean 0 and variance 1 over images [B, 3, H, W], without changing a reconstruction.

    The affine map is folded into the 1x1 convolutions on either side of the latents, so that the one scaling factor
    (arXiv:2112.10752, appendix G) serves every channel.
    """
    # Each pixel of the latents has the same weight, whatever the size of its image: [C, pixels].
    latents = torch.cat([encoder(batch).mean.transpose(0, 1).flatten(1) for batch in batches], dim=1)
    mean, std = latents.mean(dim=1), latents.std(dim=1)
    std = torch.where(std > 0, std, 1)  # a constant channel is not changed
    mean = mean / encoder.config.scaling_factor  # undo the scaling factor: to the scale of the convolutions
    quant_weight, quant_bias = _weight_and_bias(encoder.quant_conv)
    post_weight, post_bias = _weight_and_bias(decoder.post_quant_conv)
    # post(z) = W z + b = (W * std) z' + (W @ mean + b) for z' = (z - mean) / std
    post_bias.add_(post_weight[:, :, 0, 0] @ mean)
    post_weight.mul_(std[None, :, None, None])
    channels = len(mean)
    quant_weight[:channels].div_(std[:, None, None, None])
    quant_bias[:channels].sub_(mean).div_(std)
    quant_bias[channels:].sub_(2 * std.log())


def _weight_and_bias(convolution: nn.Conv2d) -> tuple[Tensor, Tensor]:
    assert convolution.bias is not None  # all convolutions of the VAE have one
    return convolution.weight, convolution.bias
