"""Shared fixtures: a folder of six small pictures, and tiny recipes over it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image, ImageDraw

from latentgen.train.config import TrainConfig, load_config

COLOURS = ("red", "green", "blue", "yellow", "black", "white")

VAE: dict[str, Any] = {
    "block_out_channels": [16, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "sample_size": 16,
    "scaling_factor": 0.5,
}
TEXT_TO_IMAGE: dict[str, Any] = {
    "kind": "text_to_image",
    "unet": {
        "sample_size": 8,
        "block_out_channels": [16, 32],
        "layers_per_block": 1,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
        "norm_num_groups": 8,
    },
    "text_encoder": {
        "vocab_size": 530,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 8,
        "projection_dim": 16,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    },
    "scheduler": {
        "_class_name": "DDIMScheduler",
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "clip_sample": False,
        "prediction_type": "v_prediction",
    },
    "cached_views": 2,
}


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Six pictures of 16x16, each a disc of one colour on grey, with captions in text files."""
    folder = tmp_path / "images"
    folder.mkdir()
    for colour in COLOURS:
        image = Image.new("RGB", (16, 16), "grey")
        ImageDraw.Draw(image).ellipse((3, 3, 12, 12), fill=colour)
        image.save(folder / f"{colour}.png")
        (folder / f"{colour}.txt").write_text(f"{colour} disc", "utf-8")
    return folder


MakeRecipe = Callable[..., TrainConfig]


@pytest.fixture
def autoencoder_recipe(tmp_path: Path, image_folder: Path) -> MakeRecipe:
    """`autoencoder_recipe("max_steps=2", ...)` is a tiny recipe with these fields replaced."""
    return _recipes(tmp_path, image_folder, {"kind": "autoencoder", "vae": VAE})


@pytest.fixture
def text_to_image_recipe(tmp_path: Path, image_folder: Path, tiny_checkpoint: Path) -> MakeRecipe:
    """As `autoencoder_recipe`, in the latents of the tiny checkpoint's autoencoder (half the images' side)."""
    return _recipes(tmp_path, image_folder, TEXT_TO_IMAGE | {"vae": str(tiny_checkpoint)})


def _recipes(tmp_path: Path, image_folder: Path, task: dict[str, Any]) -> MakeRecipe:
    fields = {
        "output_dir": str(tmp_path / "run"),
        "task": task,
        "data": {"kind": "imagefolder", "path": str(image_folder), "image_size": 16},
        "seed": 5,
        "batch_size": 4,
        "max_steps": 4,
        "optimizer": {"name": "muon", "learning_rate": 0.003, "warmup_steps": 2, "decay_fraction": 0.5},
        "ema_decay": 0.9,
        "checkpoint_every": 1,
        "keep_checkpoints": 100,
        "log_every": 1,
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(fields), "utf-8")
    return lambda *overrides: load_config(path, overrides)


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps precision and accumulation for the whole process: forget them after each test."""
    yield
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
