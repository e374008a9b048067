"""The objective of text to image in the latents of an autoencoder (arXiv:2112.10752, eq. 3) or in pixels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from latentgen.checkpoints.folder import CheckpointFolder
from latentgen.checkpoints.weights import load_weights
from latentgen.diffusion.scheduler import Scheduler
from latentgen.errors import ConfigError, ResumeError
from latentgen.files import quote
from latentgen.models.config import CLIPTextConfig
from latentgen.models.text import CLIPText
from latentgen.models.text_loading import load_tokenizer, save_tokenizer
from latentgen.models.unet import UNet
from latentgen.models.unet_config import UNetConfig
from latentgen.pipelines.text_to_image import TextToImagePipeline
from latentgen.train.config import TextToImageTask
from latentgen.train.data import CaptionedDataset
from latentgen.train.objectives.base import Check, unchecked
from latentgen.train.objectives.finished import check_fit, load_vae, open_vae
from latentgen.train.objectives.latent_diffusion import LatentObjective
from latentgen.train.objectives.tokenizer import train_tokenizer

_TOKENIZER = "tokenizer"


class TextToImageObjective(LatentObjective[TextToImageTask]):
    """A UNet that is shown nothing beside the noisy latents; the text encoder learns along with it, or is frozen.

    Without an autoencoder the mean of the cached views is the pixels, and their standard deviation 0.

    Args:
        task: what the recipe says.
        data: the captioned images.
        seed: the run's seed, which the cached views follow.
        device: where the images are encoded; the objective itself stays on the CPU.
        init_from: a folder in the diffusers layout whose UNet, text encoder and tokenizer to begin with, instead of
            random weights and a tokenizer made from the captions.
        assets: the folder that `save_assets` wrote to, if the run is resumed.
        check: looks at this objective before anything is encoded.

    Raises:
        ConfigError: a configuration is wrong, or they do not fit each other.
        CheckpointError: the autoencoder or `init_from` cannot be used; the subclass says why.
        ResumeError: `assets` holds no tokenizer.
    """

    def __init__(
        self,
        task: TextToImageTask,
        data: CaptionedDataset,
        *,
        seed: int,
        device: torch.device,
        init_from: Path | None = None,
        assets: Path | None = None,
        check: Check = unchecked,
    ) -> None:
        super().__init__(task, data, device, Scheduler.from_config(task.scheduler))
        unet_config = UNetConfig.from_json(task.unet)
        text_config = CLIPTextConfig.from_json(task.text_encoder)
        vae, vae_config = open_vae(task.vae)
        check_fit(
            unet_config,
            vae_config,
            context_width=text_config.hidden_size,
            data=data,
            in_channels={vae_config.latent_channels: "the latents alone"},
        )
        origin = None if init_from is None else CheckpointFolder.open(init_from)
        self.unet = UNet(unet_config)
        if origin is not None:
            _load_unet(self.unet, origin, task.reinit_layers)
        self._text = _text_encoder(text_config, data, origin, assets)
        self._text.module.requires_grad_(task.train_text_encoder)
        self._vae = load_vae(vae)
        self._look_ahead(data, seed, device, check)
        self._prepare(data, seed, device)

    def save_assets(self, folder: Path) -> None:
        """Write the tokenizer: the weights are worth nothing with another one."""
        save_tokenizer(self._text.towers[0].tokenizer, folder / _TOKENIZER)

    def _pipeline(self) -> TextToImagePipeline:
        encoder, decoder = self._vae
        return TextToImagePipeline(
            self.unet,
            decoder,
            self._text,
            self.scheduler,
            load_encoder=lambda: encoder,
            default_guidance_scale=self._guidance_scale("StableDiffusionPipeline"),
        )


def _load_unet(unet: UNet, origin: CheckpointFolder, reinit_layers: Sequence[str]) -> None:
    """Give the UNet the weights of `origin`, all but those of its fresh layers, which may have other shapes there."""
    layers = dict(unet.named_children())
    if unknown := [name for name in reinit_layers if name not in layers]:
        raise ConfigError(
            f"task.reinit_layers: {quote(unknown[0])} is no layer of this UNet; its layers are: {', '.join(layers)}"
        )
    kept = nn.ModuleDict({name: layer for name, layer in layers.items() if name not in reinit_layers})
    fresh_prefixes = tuple(f"{name}." for name in reinit_layers)
    load_weights(kept, origin.weight_files("unet"), ignored_prefixes=fresh_prefixes, dtype=torch.float32)


def _text_encoder(
    config: CLIPTextConfig, data: CaptionedDataset, origin: CheckpointFolder | None, assets: Path | None
) -> CLIPText:
    """The text encoder that the run begins with, and the run's tokenizer."""
    kept = None if assets is None else assets / _TOKENIZER
    if kept is not None and not kept.is_dir():
        raise ResumeError(
            f"{quote(kept)} is not there, and without the run's own tokenizer its weights are worth nothing: copy it "
            "from a model that this run has saved, or start a new run"
        )
    if origin is not None:
        tokenizer = origin.tokenizer("tokenizer") if kept is None else load_tokenizer(kept)
        return CLIPText.from_weights(config, tokenizer, origin.weights("text_encoder"), dtype=torch.float32)
    if kept is not None:
        return CLIPText.from_config(config, load_tokenizer(kept))
    tokenizer = train_tokenizer(
        data.captions(), vocab_size=config.vocab_size, max_length=config.max_position_embeddings
    )
    special = {
        "bos_token_id": (config.bos_token_id, tokenizer.bos_token_id),
        "eos_token_id": (config.eos_token_id, tokenizer.eos_token_id),
        "pad_token_id": (config.pad_token_id, tokenizer.pad_token_id),
    }
    wrong = [f"{name} is {found} and must be {due}" for name, (found, due) in special.items() if found != due]
    if wrong:
        raise ConfigError(f"task.text_encoder does not fit the tokenizer of the captions: {'; '.join(wrong)}")
    return CLIPText.from_config(config, tokenizer)
