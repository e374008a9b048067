"""The objective of text to image in the latents of an autoencoder (arXiv:2112.10752, eq. 3) or in pixels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from latentgen.checkpoints.folder import CheckpointFolder
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
from latentgen.train.objectives.base import Preflight
from latentgen.train.objectives.latent_diffusion import LatentObjective
from latentgen.train.objectives.pretrained import check_fit, load_vae

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

_TOKENIZER = "tokenizer"
BOS = "<|startoftext|>"
EOS = "<|endoftext|>"
END_OF_WORD = "</w>"
# Every byte, alone and at the end of a word, and the two special tokens.
MIN_VOCAB_SIZE = 2 + 2 * 256


class TextToImageObjective(LatentObjective[TextToImageTask]):
    """A UNet conditioned only on captions; the text encoder is trained along with it, or frozen.

    Without an autoencoder the mean of the cached views is the pixels, and their standard deviation 0.

    Args:
        task, data, seed, device: see LatentObjective.
        init_from: a folder in the diffusers layout whose UNet, text encoder and tokenizer to start from, instead of
            random weights and a tokenizer made from the captions.
        assets: the folder that `save_tokenizer` wrote to, if the run is resumed.
        preflight: called with this objective before anything is encoded.

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
        preflight: Preflight | None = None,
    ) -> None:
        super().__init__(task, data, Scheduler.from_config(task.scheduler), seed=seed, device=device)
        unet_config = UNetConfig.from_json(task.unet)
        text_config = CLIPTextConfig.from_json(task.text_encoder)
        self._vae = load_vae(task.vae)
        vae_config = self._vae[0].config
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
        self._preflight(preflight)
        self._prepare()

    def save_tokenizer(self, folder: Path) -> None:
        """Write the tokenizer, without which the weights are useless."""
        save_tokenizer(self._text.towers[0].tokenizer, folder / _TOKENIZER)

    def pipeline(self) -> TextToImagePipeline:
        """See LatentObjective.pipeline."""
        return self._pipeline_of(TextToImagePipeline, "StableDiffusionPipeline")


def _load_unet(unet: UNet, origin: CheckpointFolder, reinit_layers: Sequence[str]) -> None:
    """Load the weights of `origin`, except those of `reinit_layers`, which may have other shapes there."""
    layers = dict(unet.named_children())
    if unknown := [name for name in reinit_layers if name not in layers]:
        raise ConfigError(
            f"task.reinit_layers: {quote(unknown[0])} is not a layer of this UNet; its layers are: {', '.join(layers)}"
        )
    loaded = nn.ModuleDict({name: layer for name, layer in layers.items() if name not in reinit_layers})
    fresh_prefixes = tuple(f"{name}." for name in reinit_layers)
    origin.weights("unet").load_into(loaded, ignored_prefixes=fresh_prefixes, dtype=torch.float32)


def _text_encoder(
    config: CLIPTextConfig, data: CaptionedDataset, origin: CheckpointFolder | None, assets: Path | None
) -> CLIPText:
    """The text encoder that the run starts with, and the run's tokenizer."""
    saved = None if assets is None else assets / _TOKENIZER
    if saved is not None and not saved.is_dir():
        raise ResumeError(f"the tokenizer {quote(saved)} is missing: copy it from a model of this run")
    if origin is not None:
        tokenizer = origin.tokenizer("tokenizer") if saved is None else load_tokenizer(saved)
        return CLIPText.from_weights(config, tokenizer, origin.weights("text_encoder"), dtype=torch.float32)
    if saved is not None:
        return CLIPText.from_config(config, load_tokenizer(saved))
    tokenizer = train_tokenizer(
        data.captions(), vocab_size=config.vocab_size, max_length=config.max_position_embeddings
    )
    special = {
        "bos_token_id": (config.bos_token_id, tokenizer.bos_token_id),
        "eos_token_id": (config.eos_token_id, tokenizer.eos_token_id),
        "pad_token_id": (config.pad_token_id, tokenizer.pad_token_id),
    }
    wrong = [f"{name} is {ours} and must be {its}" for name, (ours, its) in special.items() if ours != its]
    if wrong:
        raise ConfigError(f"task.text_encoder does not fit the tokenizer of the captions: {'; '.join(wrong)}")
    return CLIPText.from_config(config, tokenizer)


def train_tokenizer(corpus: Sequence[str], *, vocab_size: int, max_length: int) -> CLIPTokenizer:
    """A byte-pair tokenizer in CLIP's format: the most common pairs are merged (arXiv:1508.07909) until there are
    `vocab_size` tokens.

    Every byte is a token, alone and at the end of a word, so that any Unicode text can be tokenized. The same corpus
    gives the same tokenizer in every process, and so in a resumed run. `vocab_size` includes the two special tokens and
    the 512 bytes; `max_length` is the text encoder's window.

    Raises:
        ConfigError: `vocab_size` is too small for the bytes.
    """
    from tokenizers import pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    if vocab_size < MIN_VOCAB_SIZE:
        raise ConfigError(f"text_encoder.vocab_size is {vocab_size}; at least {MIN_VOCAB_SIZE} are needed")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        # By default the trainer numbers the ends of words in the order of a hash table that differs in each
        # process, and breaks the ties between pairs by these numbers. Special tokens are numbered as listed.
        special_tokens=[BOS, EOS, *alphabet, *(byte + END_OF_WORD for byte in alphabet)],
        end_of_word_suffix=END_OF_WORD,
        show_progress=False,
    )
    learner = CLIPTokenizer().backend_tokenizer
    learner.train_from_iterator(corpus, trainer)
    trained = json.loads(learner.to_str())["model"]
    merges: Any = [(left, right) for left, right in trained["merges"]]
    return CLIPTokenizer(vocab=trained["vocab"], merges=merges, model_max_length=max_length)
