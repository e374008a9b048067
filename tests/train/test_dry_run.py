"""A dry run reports what a run would do, and changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from latentgen.errors import ResumeError
from latentgen.image_file import save_image
from latentgen.train.dry_run import DryRunReport, dry_run
from latentgen.train.objectives import class_images
from latentgen.train.trainer import train
from tests.train.finetuning import METHODS, PRIOR, finetune_recipe
from tests.train.recipes import MakeRecipe
from tests.train.runs import files_of, on_step


def test_a_dry_run_reports_and_writes_nothing(text_to_image_recipe: MakeRecipe, tmp_path: Path):
    config = text_to_image_recipe(
        *(
            "validation_fraction=0.34",
            "gradient_accumulation_steps=2",
            "max_steps=50",
            "trackers=[tensorboard]",
        ),
        *("validation.prompts=[red disc]", "task.train_text_encoder=true"),
    )
    before = files_of(tmp_path)
    report = dry_run(config)
    assert files_of(tmp_path) == before
    assert not config.output_dir.exists()
    assert (report.images, report.held_out, report.samples, report.processes, report.step) == (4, 2, 8, 1, 0)
    assert 0 < report.trained == report.parameters
    assert report.seconds_per_step > 0
    text = "\n".join(report.lines())
    assert "4 = 2 samples x 1 processes x 2 accumulated parts" in text
    assert "50; 2 steps an epoch, 25 epochs" in text


@pytest.mark.parametrize(("warmup", "warns"), [(100, True), (4, True), (3, False), (0, False)])
def test_a_warning_says_if_the_warm_up_outlasts_the_run(
    warmup: int, warns: bool, autoencoder_recipe: MakeRecipe, capsys: pytest.CaptureFixture[str]
):
    config = autoencoder_recipe(f"optimizer.warmup_steps={warmup}")
    message = f"optimizer.warmup_steps is {warmup} and max_steps 4"
    assert any(message in line for line in dry_run(config).lines()) == warns
    capsys.readouterr()
    train(config)
    assert (message in capsys.readouterr().err) == warns


def test_class_images_are_generated_for_one_step_and_deleted(
    tmp_path: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    drawn: list[Path] = []

    def save_seen(image: Image.Image, file: Path) -> None:
        drawn.append(file)
        save_image(image, file)

    monkeypatch.setattr(class_images, "save_image", save_seen)
    task = {"kind": "finetune", "method": METHODS["lora"], "views_per_image": 2}
    config = finetune_recipe(tmp_path, image_folder, "lora", task=task | {"prior": PRIOR | {"images": 100}})
    before = files_of(tmp_path)
    report = dry_run(config)
    assert 0 < report.trained < report.parameters
    assert files_of(tmp_path) == before
    assert not config.output_dir.exists()
    assert len(drawn) == config.batch_size
    assert not any(file.exists() for file in drawn)


def test_frozen_weights_are_not_counted_as_trained(upscale_recipe: MakeRecipe):
    in_every_step = dry_run(upscale_recipe("task.views_per_image=0"))
    assert 0 < in_every_step.trained < in_every_step.parameters
    before = dry_run(upscale_recipe())
    assert before.trained == before.parameters == in_every_step.trained


def test_a_dry_run_leaves_the_next_run_unchanged(
    autoencoder_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
):
    config = autoencoder_recipe()
    dry_run(config)
    steps: list[int] = []
    on_step(monkeypatch, before=lambda _, step: steps.append(step))
    train(config)
    assert steps == [0, 1, 2, 3]


def test_a_resumed_run_reports_the_remaining_steps(autoencoder_recipe: MakeRecipe):
    train(autoencoder_recipe("max_steps=2"))
    config = autoencoder_recipe("max_steps=6")
    with pytest.raises(ResumeError, match="already holds a run"):
        dry_run(config)
    before = files_of(config.output_dir)
    report = dry_run(autoencoder_recipe("max_steps=6", "resume=true"))
    assert report.step == 2
    assert "6, of which 2 are done" in "\n".join(report.lines())
    assert files_of(config.output_dir) == before


def test_the_estimate_counts_the_remaining_steps(autoencoder_recipe: MakeRecipe):
    counts = {"trained": 1, "parameters": 2, "images": 8, "held_out": 0, "samples": 16, "processes": 2}
    report = DryRunReport(
        config=autoencoder_recipe("max_steps=100", "batch_size=4"),
        step=40,
        **counts,
        device="cpu",
        seconds_per_step=2.0,
        peak_bytes=3 * 2**30,
    )
    text = "\n".join(report.lines())
    assert "0:02:00 for 60 steps" in text
    assert "2 s a step, 2 samples/s" in text
    assert "4 steps an epoch, 25 epochs" in text
    assert "3.0 GiB" in text
