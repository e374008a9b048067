"""Shared fixtures: a tiny random Stable Diffusion checkpoint, written by diffusers, the tests' oracle."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTokenizer

# No test reaches the network; read by huggingface_hub when it is first imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Merges on top of the 256 bytes of a BPE vocabulary: some words become one token, others several.
_MERGES = (
    ("c", "a"),
    ("ca", "t</w>"),
    ("r", "e"),
    ("re", "d</w>"),
    ("d", "o"),
    ("do", "g</w>"),
    ("t", "i"),
    ("ti", "g"),
    ("e", "r</w>"),
    ("tig", "er</w>"),
)


def build_tokenizer() -> CLIPTokenizer:
    """A byte-level CLIPTokenizer: each byte, alone and at the end of a word, a few merges, 77 positions."""
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    pieces = [*letters, *(letter + "</w>" for letter in letters), *("".join(merge) for merge in _MERGES)]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocab, merges=list(_MERGES), model_max_length=77)


def build_pipeline(**unet_fields: Any) -> StableDiffusionPipeline:
    """A Stable Diffusion 1.x pipeline of diffusers with tiny random weights, the same at every call.

    With other fields of the UNet, such as `in_channels`, its parts are those of another pipeline.
    """
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = build_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fields: dict[str, Any] = {
            "sample_size": 8,
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": 32,
            "attention_head_dim": 4,
            "norm_num_groups": 8,
        }
        unet = UNet2DConditionModel(**fields | unet_fields)
        vae = AutoencoderKL(
            block_out_channels=(32, 64),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=8,
            sample_size=16,
            scaling_factor=0.18215,
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=77,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder of :func:`build_pipeline`; copy it before changing a file."""
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny-stable-diffusion"
    build_pipeline().save_pretrained(folder, safe_serialization=True)
    return folder
