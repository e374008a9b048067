"""The finished networks beside which a UNet is trained, and whether they fit it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from latentgen.checkpoints.folder import CheckpointFolder
from latentgen.errors import ConfigError
from latentgen.models.config import VAEConfig
from latentgen.models.pixels import RGB, ImageDecoder, ImageEncoder, PixelConfig, PixelDecoder, PixelEncoder
from latentgen.models.text import CLIPText
from latentgen.models.unet_config import UNetConfig
from latentgen.pipelines.load_save import load_decoder, load_encoder, load_text_encoder
from latentgen.train.data import CaptionedDataset, check_sides
from latentgen.train.objectives.lent import IDLE


def open_vae(path: Path | None) -> tuple[CheckpointFolder | None, VAEConfig | PixelConfig]:
    """The folder of a finished autoencoder, None for pixels, and its configuration."""
    if path is None:
        return None, RGB
    folder = CheckpointFolder.open(path)
    return folder, VAEConfig.from_json(folder.config("vae"))


def load_vae(folder: CheckpointFolder | None) -> tuple[ImageEncoder, ImageDecoder]:
    """A finished autoencoder, or that of pixels for None, in float32 on the CPU."""
    if folder is None:
        return PixelEncoder(), PixelDecoder()
    return load_encoder(folder, IDLE), load_decoder(folder, IDLE)


def finished_text_encoder(folder: Path) -> CLIPText:
    """A text encoder whose weights are not trained, in float32 on the CPU.

    Raises:
        ConfigError: it is SDXL's pair, which no model that is trained here is told.
    """
    joined = load_text_encoder(CheckpointFolder.open(folder), IDLE)
    if not isinstance(joined, CLIPText):
        raise ConfigError("task.text_encoder has two text encoders; name the folder of a model with one")
    return joined


def check_fit(
    unet: UNetConfig,
    vae: VAEConfig | PixelConfig,
    *,
    context_width: int,
    data: CaptionedDataset,
    in_channels: Mapping[int, str],
) -> None:
    """Refuse configurations of which one cannot take what another gives.

    Args:
        unet: the UNet's.
        vae: the autoencoder's.
        context_width: the channels of what the text encoder gives.
        data: the images.
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
    if problems:
        raise ConfigError("the parts of the recipe do not fit each other: " + "; ".join(problems))
    check_sides(data, vae.spatial_factor)
