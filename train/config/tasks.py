"""The sections of a recipe that say what is learnt."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from latentgen.deprecated import warn_renamed
from latentgen.train.config.base import Positive, Rate, Section
from latentgen.train.config.loss import LatentLoss

Degradation = Literal["colorization", "uncropping", "jpeg", "inpainting"]


def _american(degradation: object) -> object:
    if degradation != "colourisation":
        return degradation
    warn_renamed("the degradation colourisation", "colorization")
    return "colorization"


class AutoencoderTask(Section):
    """Train a KL autoencoder: reconstruction, edges and a slight pull of the latents towards the standard normal.

    `vae` is the content of a diffusers `vae/config.json`. Without `train_encoder` the decoder alone learns, and the
    latents stay those of `init_from`.
    """

    kind: Literal["autoencoder"]
    vae: dict[str, Any]
    edge_weight: Annotated[float, Field(ge=0, le=100)] = 0.5
    kl_weight: Annotated[float, Field(ge=0, le=1)] = 1e-6
    train_encoder: bool = True


class DiffusionTask(Section):
    """What all tasks of diffusion in the latents of a finished autoencoder have in common.

    `views_per_image` random views of every item are encoded once, before training, and kept in memory or, with
    `cache_dir`, in a folder that all runs may share; 0 draws and encodes new ones in every step. So are the captions
    where the text encoder does not learn, unless they are shuffled, or too many for memory without `cache_dir`. Where
    neither crops nor mirroring nor the task is random, the views of an item are the same, and one is encoded.

    A `timestep_shift` above 1 spends more samples on the noisier timesteps; `guidance_scale` is what the finished model
    is guided with where a call names none; `save_half` writes it in float16.
    """

    caption_dropout: Rate = 0.1
    views_per_image: Annotated[int, Field(ge=0, le=4096)] = 16
    cache_dir: Path | None = None
    timestep_shift: Positive = 1.0
    loss: LatentLoss = LatentLoss()
    guidance_scale: Annotated[float, Field(ge=0, le=1e6)] | None = None
    save_half: bool = False


class LatentTask(DiffusionTask):
    """A task that states its networks: `unet` and `scheduler` are the contents of the diffusers configurations.

    The other fields are those of DiffusionTask.
    """

    unet: dict[str, Any]
    scheduler: dict[str, Any]


class TextToImageTask(LatentTask):
    """Train a UNet and its text encoder jointly in the latents of a finished autoencoder, or in pixels.

    `vae` is a folder with that autoencoder, or null for pixels; `text_encoder` is the content of a configuration.
    Without `train_text_encoder` the text encoder stays that of `init_from`; `reinit_layers` of the UNet, such as
    `conv_in`, begin at random all the same. The other fields are those of LatentTask.
    """

    kind: Literal["text_to_image"]
    vae: Path | None
    text_encoder: dict[str, Any]
    train_text_encoder: bool = True
    reinit_layers: tuple[str, ...] = ()


class UpscaleTask(LatentTask):
    """Train a UNet to draw images that it is shown in low resolution, in latents or on pixels.

    The low-resolution image is the true one, resampled with a random kernel to `image_size` / scale. The scale follows
    from `unet.in_channels`, which is the channels of the latents and 3 * r * r: it is the autoencoder's factor / r.
    Without an autoencoder (`vae: null`) the UNet, of 6 channels, works on pixels and is shown the image `enlargement`
    times as large, which is the scale then. It is told the level, at most `max_noise_level`, to which
    `low_res_scheduler` noises what it is shown.

    `text_encoder` is a folder whose text encoder and tokenizer are used as they are. The other fields are those of
    LatentTask.
    """

    kind: Literal["upscale"]
    vae: Path | None
    text_encoder: Path
    low_res_scheduler: dict[str, Any]
    max_noise_level: Annotated[int, Field(ge=0, le=10**5)] = 350
    enlargement: Annotated[int, Field(ge=1, le=16)] = 1


class PairedTask(LatentTask):
    """Train a UNet to undo what was done to the images that it is shown, in latents or, with `vae: null`, on pixels.

    `degradation` is what is done to them: see latentgen.train.objectives.degradation. `unet.in_channels` is twice the
    channels of the latents. With `init_from` the run begins as that model, which may be one of text to image, whose
    UNet has half of these channels: the others count for nothing at first.

    `text_encoder` is a folder whose text encoder and tokenizer are used as they are. The other fields are those of
    LatentTask.
    """

    kind: Literal["paired"]
    vae: Path | None
    text_encoder: Path
    degradation: Annotated[Degradation, BeforeValidator(_american)]
