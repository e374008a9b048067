"""Shared fixtures: a folder of six small pictures, and tiny recipes over it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image, ImageDraw

from latentgen.train.config import TrainConfig, load_config
from tests.train.recipes import COLOURS, PAIRED, TEXT_TO_IMAGE, UPSCALE, VAE, MakeRecipe
from tests.train.runs import forget_accelerate


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


@pytest.fixture
def autoencoder_recipe(tmp_path: Path, image_folder: Path) -> MakeRecipe:
    """`autoencoder_recipe("max_steps=2", ...)` is a tiny recipe with these fields replaced."""
    return _recipes(tmp_path, image_folder, {"kind": "autoencoder", "vae": VAE})


@pytest.fixture
def text_to_image_recipe(tmp_path: Path, image_folder: Path, tiny_checkpoint: Path) -> MakeRecipe:
    """As `autoencoder_recipe`, in the latents of the tiny checkpoint's autoencoder (half the images' side)."""
    return _recipes(tmp_path, image_folder, TEXT_TO_IMAGE | {"vae": str(tiny_checkpoint)})


@pytest.fixture
def upscale_recipe(tmp_path: Path, image_folder: Path, tiny_checkpoint: Path) -> MakeRecipe:
    """As `text_to_image_recipe`, with the tiny checkpoint's text encoder as well."""
    folder = tmp_path / "finished"
    shutil.copytree(tiny_checkpoint, folder)
    config = folder / "vae" / "config.json"
    # The one factor with which diffusers' upscaler decodes, whatever the file says.
    config.write_text(config.read_text("utf-8").replace("0.18215", "0.08333"), "utf-8")
    finished = {"vae": str(folder), "text_encoder": str(folder)}
    return _recipes(tmp_path, image_folder, UPSCALE | finished)


@pytest.fixture
def paired_recipe(tmp_path: Path, image_folder: Path, tiny_checkpoint: Path) -> MakeRecipe:
    """As `text_to_image_recipe`, with the tiny checkpoint's text encoder as well."""
    finished = {"vae": str(tiny_checkpoint), "text_encoder": str(tiny_checkpoint)}
    return _recipes(tmp_path, image_folder, PAIRED | finished)


@pytest.fixture
def lora_recipe(tmp_path: Path, image_folder: Path, tiny_checkpoint: Path) -> MakeRecipe:
    """As `autoencoder_recipe`, of a LoRA for the tiny checkpoint's UNet and text encoder."""
    method = {"kind": "lora", "rank": 2, "dropout": 0.3, "train_text_encoder": True}
    task = {"kind": "finetune", "method": method, "views_per_image": 2}
    return _recipes(tmp_path, image_folder, task, init_from=tiny_checkpoint)


@pytest.fixture
def bucket_recipe(autoencoder_recipe: MakeRecipe, image_folder: Path) -> MakeRecipe:
    """As `autoencoder_recipe`, over three buckets, with random crops."""
    for number, size in enumerate([(31, 18), (18, 31), (30, 20), (20, 30)]):
        Image.effect_noise(size, 90).convert("RGB").save(image_folder / f"noise{number}.png")
    fields = (
        *("data.buckets=true", "data.bucket_step=4", "data.crop=random", "data.horizontal_flip=true"),
        *("data.caption=noise", "optimizer.name=adamw", "optimizer.learning_rate=0.001"),
    )
    return lambda *overrides: autoencoder_recipe(*fields, *overrides)


def _recipes(
    tmp_path: Path, image_folder: Path, task: dict[str, Any], *, init_from: Path | None = None
) -> MakeRecipe:
    fields = {
        "init_from": None if init_from is None else str(init_from),
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
        # It takes a second of each run.
        "memory": {"planner": False},
    }
    path = tmp_path / "recipe.yaml"

    def make(*overrides: str) -> TrainConfig:
        path.write_text(yaml.safe_dump(fields), "utf-8")  # each time: a test may make several kinds
        return load_config(path, overrides)

    return make


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    yield
    forget_accelerate()
