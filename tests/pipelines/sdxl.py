"""Tiny random SDXL pipelines of diffusers: base and refiner, with the true structure in few channels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from tests.conftest import build_tokenizer

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline

WIDTH = 32
POOLED = 24
TIME_IDS_WIDTH = 8


def build_base() -> StableDiffusionXLPipeline:
    """As SDXL base: two text encoders, transformers of depth 2 and 3, six numbers besides the text."""
    from diffusers import StableDiffusionXLPipeline

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        parts = _shared(depths=(1, 2, 3), time_ids=6, context=2 * WIDTH)
        tokenizer = build_tokenizer()
        text_encoder = _tower(tokenizer, projects=False)
    return StableDiffusionXLPipeline(**parts, tokenizer=tokenizer, text_encoder=text_encoder)


def build_refiner() -> StableDiffusionXLImg2ImgPipeline:
    """As SDXL's refiner: the second text encoder alone, and an aesthetic score in place of the target size."""
    from diffusers import StableDiffusionXLImg2ImgPipeline

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        parts = _shared(depths=(1, 2, 2), time_ids=5, context=WIDTH)
    return StableDiffusionXLImg2ImgPipeline(
        **parts,
        tokenizer=None,
        text_encoder=None,
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
    )


def _shared(*, depths: tuple[int, ...], time_ids: int, context: int) -> dict[str, Any]:
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel

    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "!"})
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32, 32),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=list(depths),
        cross_attention_dim=context,
        attention_head_dim=[2, 4, 4],
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_IDS_WIDTH,
        projection_class_embeddings_input_dim=POOLED + time_ids * TIME_IDS_WIDTH,
        norm_num_groups=8,
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
        sample_size=16,
        scaling_factor=0.13025,
    )
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="leading",
        steps_offset=1,
    )
    return {
        "unet": unet.eval(),
        "vae": vae.eval(),
        "scheduler": scheduler,
        "tokenizer_2": tokenizer,
        "text_encoder_2": _tower(tokenizer, projects=True),
        "add_watermarker": False,
    }


def _tower(tokenizer: Any, *, projects: bool) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        projection_dim=POOLED,
        hidden_act="gelu" if projects else "quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projects else CLIPTextModel)(config).eval()
