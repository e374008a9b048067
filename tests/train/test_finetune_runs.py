"""Complete fine-tuning runs: the loss falls, and a resumed run equals an uninterrupted one."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from latentgen.train.trainer import train
from tests.train.finetuning import METHODS, PRIOR, finetune_recipe
from tests.train.runs import copy_until, files_of, losses_of


@pytest.mark.parametrize("method", METHODS)
def test_resuming_changes_nothing(method: str, tmp_path: Path, image_folder: Path):
    whole = finetune_recipe(tmp_path, image_folder, method, gradient_accumulation_steps=2)
    train(whole)
    cut = tmp_path / "cut"
    copy_until(2, whole, cut)
    shutil.rmtree(cut / "class_images", ignore_errors=True)  # generated again, they are the same
    torch.manual_seed(2)
    resumed = {"resume": True, "output_dir": str(cut)}
    train(finetune_recipe(tmp_path, image_folder, method, gradient_accumulation_steps=2, **resumed))
    for folder in ("class_images", "checkpoint-00000004", "model"):
        expected = files_of(whole.output_dir / folder)
        actual = files_of(cut / folder)
        assert actual.keys() == expected.keys()
        for name, content in expected.items():
            if name.name not in ("state.json", "manifest.json", "README.md"):  # which name the run's folder
                assert actual[name] == content, name


@pytest.mark.parametrize(("method", "rate"), [("full", 0.002), ("lora", 0.02)])
def test_the_loss_falls(method: str, rate: float, tmp_path: Path, image_folder: Path):
    optimizer = {"learning_rate": rate, "warmup_steps": 2, "weight_decay": 0.0}
    config = finetune_recipe(
        tmp_path, image_folder, method, max_steps=40, checkpoint_every=40, batch_size=6, optimizer=optimizer
    )
    train(config)
    losses = losses_of(config)
    assert sum(losses[-10:]) < 0.95 * sum(losses[:10])


@pytest.mark.slow
def test_two_processes_share_the_class_images_and_train_as_one(tmp_path: Path, image_folder: Path):
    # Dropout draws for a whole micro-batch, so it depends on their number.
    method = METHODS["lora"] | {"dropout": 0.0}
    task = {"kind": "finetune", "method": method, "prior": PRIOR | {"images": 18}, "views_per_image": 2}
    one = finetune_recipe(tmp_path, image_folder, "lora", task=task, max_steps=6)
    train(one)
    two = finetune_recipe(
        tmp_path, image_folder, "lora", task=task, max_steps=6, output_dir=str(tmp_path / "two")
    )
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    subprocess.run([*launch, "-m", "latentgen.train", str(tmp_path / "recipe.yaml")], check=True, timeout=600)
    assert losses_of(two) == pytest.approx(losses_of(one), rel=1e-5)
    drawn = [files_of(config.output_dir / "class_images") for config in (one, two)]
    assert len(drawn[0]) == 18
    assert drawn[0] == drawn[1]


def test_a_run_may_start_from_a_trained_model(tmp_path: Path, image_folder: Path):
    first = finetune_recipe(tmp_path, image_folder, "full", max_steps=1, ema_decay=0.0)
    model = train(first)
    again = finetune_recipe(
        tmp_path, image_folder, "lora", max_steps=1, init_from=str(model), output_dir=str(tmp_path / "two")
    )
    assert {file.name for file in train(again).iterdir()} == {
        "pytorch_lora_weights.safetensors",
        "lora_kohya.safetensors",
        "README.md",
    }
