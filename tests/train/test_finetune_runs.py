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
from tests.train.runs import files_of, losses_of


@pytest.mark.parametrize("method", METHODS)
def test_resuming_at_any_step_changes_nothing(method: str, tmp_path: Path, image_folder: Path):
    whole = finetune_recipe(tmp_path, image_folder, method, gradient_accumulation_steps=2)
    train(whole)
    expected = files_of(whole.output_dir)
    class_images = whole.output_dir / "class_images"
    for step in (1, 3):
        folder = tmp_path / str(step)
        shutil.copytree(whole.output_dir, folder)
        shutil.rmtree(folder / "model")
        for later in range(step + 1, 5):
            shutil.rmtree(folder / f"checkpoint-{later:08d}")
        if class_images.is_dir():
            (folder / "class_images").rename(tmp_path / "elsewhere")  # generated again, they are the same
            shutil.rmtree(tmp_path / "elsewhere")
        torch.manual_seed(step)
        train(
            finetune_recipe(
                tmp_path,
                image_folder,
                method,
                gradient_accumulation_steps=2,
                resume=True,
                output_dir=str(folder),
            )
        )
        actual = files_of(folder)
        assert actual.keys() == expected.keys()
        for name, content in expected.items():
            if name.name not in (
                "state.json",
                "manifest.json",
                "README.md",
            ):  # which contain the folder's name
                assert actual[name] == content, name


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_falls(method: str, tmp_path: Path, image_folder: Path):
    rate = {"full": 0.002, "lora": 0.02, "textual_inversion": 0.05}[method]
    optimizer = {"learning_rate": rate, "warmup_steps": 2, "weight_decay": 0.0}
    config = finetune_recipe(
        tmp_path, image_folder, method, max_steps=60, checkpoint_every=60, batch_size=6, optimizer=optimizer
    )
    train(config)
    losses = losses_of(config)
    assert sum(losses[-10:]) < {"textual_inversion": 0.999}.get(method, 0.95) * sum(losses[:10])


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
