"""Runs over images of several sizes: any split of the work, and any pause, gives the same run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from latentgen.train.checkpoint import load_latest
from latentgen.train.trainer import train
from tests.train.recipes import MakeRecipe
from tests.train.runs import forget_accelerate, losses_of

FIELDS = (
    "data.buckets=true",
    "data.bucket_step=4",
    "data.crop=random",
    "data.horizontal_flip=true",
    "data.caption=noise",
    "optimizer.name=adamw",
    "optimizer.learning_rate=0.001",
    "optimizer.decay_fraction=0",
    "max_steps=6",
)


@pytest.fixture
def recipe(autoencoder_recipe: MakeRecipe, image_folder: Path) -> MakeRecipe:
    """A tiny recipe over three buckets."""
    for number, size in enumerate([(31, 18), (18, 31), (30, 20), (20, 30)]):
        Image.effect_noise(size, 90).convert("RGB").save(image_folder / f"noise{number}.png")
    return lambda *overrides: autoencoder_recipe(*FIELDS, *overrides)


def test_accumulating_gradients_changes_no_loss(recipe: MakeRecipe, tmp_path: Path):
    whole = recipe()
    split = recipe("gradient_accumulation_steps=2", f"output_dir={tmp_path / 'split'}")
    train(whole)
    forget_accelerate()
    train(split)
    assert losses_of(split) == pytest.approx(losses_of(whole), rel=1e-4)


def test_a_resumed_run_is_the_same_run(recipe: MakeRecipe, tmp_path: Path):
    whole, parts = recipe(), f"output_dir={tmp_path / 'parts'}"
    train(whole)
    train(recipe(parts, "max_steps=2"))
    train(recipe(parts, "max_steps=5", "resume=true"))
    train(recipe(parts, "resume=true"))
    one, other = load_latest(whole.output_dir), load_latest(tmp_path / "parts")
    assert losses_of(recipe(parts)) == losses_of(whole)
    for name, weight in one.weights.items():
        assert torch.equal(other.weights[name], weight)
