"""The objective of text to image in the latents of an autoencoder (arXiv:2112.10752, eq. 3) or in pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from latentgen.checkpoints.folder import CheckpointFolder
from latentgen.checkpoints.weights import load_weights
from latentgen.diffusion.prediction import add_noise
from latentgen.diffusion.scheduler import Scheduler
from latentgen.errors import ConfigError, ResumeError
from latentgen.files import quote
from latentgen.models.pixels import RGB, PixelConfig, PixelDecoder, PixelEncoder
from latentgen.models.text import CLIPText, CLIPTextConfig, load_tokenizer, save_tokenizer
from latentgen.models.unet import UNet
from latentgen.models.unet_config import UNetConfig
from latentgen.models.vae import VAEConfig
from latentgen.pipelines.loading import USUAL_GUIDANCE_SCALE, Placement, load_decoder, load_encoder
from latentgen.pipelines.text_to_image import TextToImagePipeline
from latentgen.train.config import TextToImageTask
from latentgen.train.data import BatchPlan, CaptionedImages
from latentgen.train.latent_diffusion import (
    attention_kernels,
    encode_views,
    fixed_views,
    prediction_loss,
    spread_timesteps,
)
from latentgen.train.objective import Loss, Objective
from latentgen.train.tokenizer import train_tokenizer

_TOKENIZER = "tokenizer"


class TextToImageObjective(Objective):
    """The error of the UNet's prediction at random noise levels; the text encoder learns along with it, or is frozen.

    The images are encoded once: `cached_views` random views of every item, kept as the mean and standard deviation of
    their latents, which without an autoencoder are the pixels and 0. Captions are drawn anew each time, and left out at
    the rate of `caption_dropout`, which teaches the unconditional prediction of classifier-free guidance
    (arXiv:2207.12598).

    Args:
        task: what the recipe says.
        data: the captioned images.
        seed: the run's seed, which the cached views follow.
        device: where the images are encoded; the objective itself stays on the CPU.
        init_from: a folder in the diffusers layout whose UNet, text encoder and tokenizer to begin with, instead of
            random weights and a tokenizer made from the captions.
        assets: the folder that `save_assets` wrote to, if the run is resumed.

    Raises:
        ConfigError: a configuration is wrong, or they do not fit each other.
        CheckpointError: the autoencoder or `init_from` cannot be used; the subclass says why.
        ResumeError: `assets` holds no tokenizer.
    """

    def __init__(
        self,
        task: TextToImageTask,
        data: CaptionedImages,
        *,
        seed: int,
        device: torch.device,
        init_from: Path | None = None,
        assets: Path | None = None,
    ) -> None:
        super().__init__()
        self.task = task
        # On a CPU the small convolutions of a latent UNet learn faster so.
        self.memory_format = torch.contiguous_format if device.type == "cpu" else torch.channels_last
        self.scheduler = Scheduler.from_config(task.scheduler)
        unet_config = UNetConfig.from_json(task.unet)
        text_config = CLIPTextConfig.from_json(task.text_encoder)
        vae = None if task.vae is None else CheckpointFolder.open(task.vae)
        vae_config = RGB if vae is None else VAEConfig.from_json(vae.config("vae"))
        _check_fit(unet_config, text_config, vae_config, data.image_size)
        origin = None if init_from is None else CheckpointFolder.open(init_from)
        self.unet = UNet(unet_config)
        if origin is not None:
            _load_unet(self.unet, origin, task.fresh_layers)
        self._text = _text_encoder(text_config, data, origin, assets)
        self.text_encoder = self._text.model.requires_grad_(task.train_text_encoder)
        placement = Placement(torch.float32, device)
        encoder = PixelEncoder() if vae is None else load_encoder(vae, placement)
        decoder = PixelDecoder() if vae is None else load_decoder(vae, placement)
        self.item_count = len(data) * task.cached_views
        views = fixed_views(data, task.cached_views, seed)
        self._views = encode_views(encoder, device, views, self.item_count)
        # In a tuple, so that the finished autoencoder is no part of what is trained.
        self._vae = (encoder.cpu(), decoder.cpu())

    def batch(self, plan: BatchPlan) -> tuple[Tensor, ...]:
        """Latents and noise [B, C, h, w], timesteps [B] and token ids [B, chunks, window]."""
        latents = self._views.latents(plan)
        count = self.scheduler.schedule.num_train_timesteps
        timesteps = spread_timesteps(plan, count, self.task.timestep_shift)
        tokens = self._text.tokenize(self._views.draw_captions(plan, self.task.caption_dropout))
        return latents, plan.noise(latents.shape[1:], "noise"), timesteps, tokens

    def forward(self, *batch: Tensor) -> Loss:
        """The mean squared error of the prediction; its part is the same at the noisier half of the timesteps."""
        latents, noise, timesteps, tokens = batch
        level = self.scheduler.schedule.batch(timesteps)
        with attention_kernels(latents):
            with torch.set_grad_enabled(self.task.train_text_encoder and torch.is_grad_enabled()):
                context = self._text.encode_tokens(tokens).context
            output = self.unet(add_noise(latents, noise, level), timesteps, context)
        return prediction_loss(output, latents, noise, level, self.scheduler)

    def compile_networks(self) -> None:
        """Compile the UNet, beside which the text encoder takes no time."""
        self.unet.compile()

    def save_assets(self, folder: Path) -> None:
        """Write the tokenizer: the weights are worth nothing with another one."""
        save_tokenizer(self._text.tokenizer, folder / _TOKENIZER)

    def save(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write the whole pipeline in the diffusers layout, in float16 if the recipe says so."""
        self.load_state_dict(dict(weights))
        dtype = torch.float16 if self.task.save_half else torch.float32
        nn.ModuleList([self.unet, self.text_encoder, *self._vae]).to(dtype)
        encoder, decoder = self._vae
        scale = self.task.guidance_scale
        TextToImagePipeline(
            unet=self.unet,
            decoder=decoder,
            text_encoder=self._text,
            scheduler=self.scheduler,
            load_encoder=lambda: encoder,
            default_guidance_scale=USUAL_GUIDANCE_SCALE if scale is None else scale,
        ).save_pretrained(folder)


def _check_fit(unet: UNetConfig, text: CLIPTextConfig, vae: VAEConfig | PixelConfig, image_size: int) -> None:
    """Refuse configurations of which one cannot take what another gives."""
    pairs = (
        ("task.unet.in_channels", unet.in_channels, "channels of the latents", vae.latent_channels),
        ("task.unet.out_channels", unet.out_channels, "channels of the latents", vae.latent_channels),
        (
            "task.unet.cross_attention_dim",
            unet.cross_attention_dim,
            "text_encoder.hidden_size",
            text.hidden_size,
        ),
    )
    problems = [f"{name} is {found}, but {what}: {due}" for name, found, what, due in pairs if found != due]
    if image_size % vae.spatial_factor:
        problems.append(
            f"data.image_size is {image_size}, no multiple of {vae.spatial_factor}, as task.vae needs it"
        )
    if problems:
        raise ConfigError("the parts of the recipe do not fit each other: " + "; ".join(problems))


def _load_unet(unet: UNet, origin: CheckpointFolder, fresh_layers: Sequence[str]) -> None:
    """Give the UNet the weights of `origin`, all but those of its fresh layers, which may have other shapes there."""
    layers = dict(unet.named_children())
    if unknown := [name for name in fresh_layers if name not in layers]:
        raise ConfigError(
            f"task.fresh_layers: {quote(unknown[0])} is no layer of this UNet; its layers are: {', '.join(layers)}"
        )
    kept = nn.ModuleDict({name: layer for name, layer in layers.items() if name not in fresh_layers})
    fresh_prefixes = tuple(f"{name}." for name in fresh_layers)
    load_weights(kept, origin.weight_files("unet"), ignored_prefixes=fresh_prefixes, dtype=torch.float32)


def _text_encoder(
    config: CLIPTextConfig, data: CaptionedImages, origin: CheckpointFolder | None, assets: Path | None
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
        data.corpus(), vocab_size=config.vocab_size, max_length=config.max_position_embeddings
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
