"""Metrics: rows of the log are means over their steps, however often a run is resumed, and TensorBoard has them too."""

from __future__ import annotations

import math
import shutil
import signal
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from tqdm import tqdm

from latentgen.errors import ConfigError, NumericalError, OutputError
from latentgen.train.checkpoint import load_latest
from latentgen.train.config import TrainConfig
from latentgen.train.distributed import build_accelerator
from latentgen.train.metrics import LOG, Metrics, trim_log
from latentgen.train.objectives.base import Subset
from latentgen.train.trainer import train
from tests.train.recipes import MakeRecipe
from tests.train.runs import events_of, on_step, rows_of, scalars_of


def make_metrics(config: TrainConfig) -> Metrics:
    config.output_dir.mkdir(parents=True, exist_ok=True)
    return Metrics(config, build_accelerator(config))


def one(**metrics: float) -> dict[str, Tensor]:
    """The metrics of a step, with a loss of 1."""
    return {"loss": torch.tensor(1.0)} | {name: torch.tensor(value) for name, value in metrics.items()}


def test_a_row_is_the_mean_over_its_steps(autoencoder_recipe: MakeRecipe, tmp_path: Path):
    every = autoencoder_recipe("max_steps=6", "checkpoint_every=100")
    train(every)
    third = autoencoder_recipe(
        "max_steps=6", "checkpoint_every=100", "log_every=4", f"output_dir={tmp_path / 'third'}"
    )
    train(third)
    rows = rows_of(every)
    first, last = rows_of(third)
    assert (first["step"], last["step"]) == (4, 6)
    for name in ("loss", "pixels", "edges", "grad_norm"):
        assert first[name] == pytest.approx(math.fsum(row[name] for row in rows[:4]) / 4, rel=1e-6)
        assert last[name] == pytest.approx(math.fsum(row[name] for row in rows[4:]) / 2, rel=1e-6)
    assert [row["learning_rate"] for row in rows] == [every.optimizer.rate_at(step, 6) for step in range(6)]


def test_the_gradient_norm_is_that_before_clipping(
    autoencoder_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
):
    norms: list[float] = []

    def clip(self: Any, parameters: Any, max_norm: float) -> Tensor:
        parameters = list(parameters)
        norms.append(math.sqrt(sum(float(p.grad.square().sum()) for p in parameters)))
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm)

    monkeypatch.setattr("accelerate.Accelerator.clip_grad_norm_", clip)
    config = autoencoder_recipe("optimizer.max_grad_norm=0.001")
    train(config)
    assert [row["grad_norm"] for row in rows_of(config)] == pytest.approx(norms, rel=1e-5)
    assert min(norms) > 0.001


def test_stopping_within_a_row_does_not_change_the_log(
    autoencoder_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    common = ("max_steps=8", "checkpoint_every=100", "log_every=3")
    whole = autoencoder_recipe(*common, f"output_dir={tmp_path / 'whole'}")
    train(whole)
    config = autoencoder_recipe(*common)
    stops = (0, 1, 4)
    on_step(
        monkeypatch, before=lambda _, step: signal.raise_signal(signal.SIGTERM) if step in stops else None
    )
    for stop in stops:
        with pytest.raises(SystemExit):
            train(autoencoder_recipe(*common, "resume=auto"))
        assert load_latest(config.output_dir).step == stop + 1
    train(autoencoder_recipe(*common, "resume=true"))
    assert [row["step"] for row in rows_of(config)] == [3, 6, 8]
    assert rows_of(config) == rows_of(whole)


def test_steps_without_a_finite_norm_are_left_out_of_its_mean(autoencoder_recipe: MakeRecipe):
    config = autoencoder_recipe()
    metrics = make_metrics(config)
    for norm in (2.0, math.inf, 4.0):
        metrics.add(one(grad_norm=norm))
    metrics.write_row(3, 0.1)
    metrics.add(one(grad_norm=math.nan))
    metrics.write_row(4, 0.1)
    assert rows_of(config) == [
        {"step": 3, "loss": 1.0, "learning_rate": 0.1, "grad_norm": 3.0},
        {"step": 4, "loss": 1.0, "learning_rate": 0.1},
    ]


def test_the_loss_of_the_noisy_half_does_not_depend_on_the_parts_of_a_batch(
    text_to_image_recipe: MakeRecipe, tmp_path: Path
):
    rows = []
    for parts in (1, 4):
        config = text_to_image_recipe(
            f"gradient_accumulation_steps={parts}", f"output_dir={tmp_path / str(parts)}", "max_steps=2"
        )
        train(config)
        rows.append([row["noisy half"] for row in rows_of(config)])
    assert rows[1] == pytest.approx(rows[0], rel=1e-4)


def test_steps_without_a_noisy_sample_are_left_out_of_its_mean(
    text_to_image_recipe: MakeRecipe, tmp_path: Path
):
    common = ("batch_size=1", "max_steps=8", "checkpoint_every=100")
    every = text_to_image_recipe(*common)
    train(every)
    once = text_to_image_recipe(*common, "log_every=8", f"output_dir={tmp_path / 'once'}")
    train(once)
    noisy = [row for row in rows_of(every) if "noisy half" in row]
    assert 0 < len(noisy) < 8
    assert all(row["noisy half"] == row["loss"] for row in noisy)
    (row,) = rows_of(once)
    assert row["noisy half"] == pytest.approx(sum(row["loss"] for row in noisy) / len(noisy), rel=1e-6)


def test_a_subset_is_weighted_by_its_samples(autoencoder_recipe: MakeRecipe):
    config = autoencoder_recipe()
    metrics = make_metrics(config)
    for total, count in ((6.0, 2.0), (0.0, 0.0), (1.0, 1.0)):
        metrics.add(one(), {"few": Subset(torch.tensor(total), torch.tensor(count))})
    resumed = make_metrics(config)
    resumed.restore(metrics.unfinished_row(3))
    resumed.write_row(3, 0.1)
    resumed.add(one(), {"few": Subset(torch.tensor(0.0), torch.tensor(0.0))})
    resumed.write_row(4, 0.1)
    assert rows_of(config) == [
        {"step": 3, "loss": 1.0, "few": pytest.approx(7 / 3), "learning_rate": 0.1},
        {"step": 4, "loss": 1.0, "learning_rate": 0.1},
    ]


def test_the_gradient_norm_of_an_old_checkpoint_is_continued(autoencoder_recipe: MakeRecipe):
    config = autoencoder_recipe()
    metrics = make_metrics(config)
    metrics.restore({"steps": 2.0, "loss": 2.0, "grad_norm": 4.0, "finite norms": 1.0})
    metrics.add(one(grad_norm=2.0))
    metrics.write_row(3, 0.1)
    assert rows_of(config) == [{"step": 3, "loss": 1.0, "learning_rate": 0.1, "grad_norm": 3.0}]


def test_rows_of_later_steps_and_cut_off_rows_are_dropped(tmp_path: Path):
    log = tmp_path / LOG
    rows = [f'{{"step": {step}, "loss": 0.5}}\n' for step in (10, 20, 30, 40)]
    log.write_bytes("".join(rows).encode() + b'{"step": 2, "lo\xff\x00')
    for step, kept in ((50, 4), (20, 2), (0, 0)):
        trim_log(log, step)
        assert log.read_text("utf-8") == "".join(rows[:kept])
    trim_log(tmp_path / "new" / LOG, 0)


def test_a_log_that_cannot_be_written(autoencoder_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    metrics = make_metrics(autoencoder_recipe())
    metrics.sync()  # of no rows
    metrics.write_validation(1, 0.5, {})
    metrics.sync()
    monkeypatch.setattr(Path, "open", full)
    for write in (metrics.sync, lambda: metrics.write_validation(2, 0.5, {})):
        with pytest.raises(OutputError, match=r"log\.jsonl.*No space left"):
            write()


def test_a_loss_that_is_not_finite_is_an_error(autoencoder_recipe: MakeRecipe):
    metrics = make_metrics(autoencoder_recipe())
    for loss in (1.0, math.nan, 1.0):
        metrics.add({"loss": torch.tensor(loss)})
    with pytest.raises(NumericalError, match="step 7 or the 2 before"):
        metrics.write_row(7, 0.1)


def test_tensorboard_reads_the_rows_once_after_a_resume(text_to_image_recipe: MakeRecipe):
    common = (
        *("trackers=[tensorboard]", "validation_fraction=0.3", "validation.loss_every=1"),
        *("validation.prompts=[red disc]", "validation.num_inference_steps=1", "validation.every=2"),
    )
    config = text_to_image_recipe(*common)
    train(config)
    before = rows_of(config)
    # As if the run was killed after step 4, with its newest checkpoint at step 2.
    for step in (3, 4):
        shutil.rmtree(config.output_dir / f"checkpoint-{step:08d}")
    resumed = text_to_image_recipe(*common, "resume=true")
    train(resumed)
    assert rows_of(resumed) == before
    scalars = scalars_of(resumed)
    for name in ("loss", "noisy half", "learning_rate", "grad_norm"):
        values = [(row["step"], row[name]) for row in before if name in row]
        assert scalars[f"train/{name}"] == [(step, pytest.approx(value, rel=1e-6)) for step, value in values]
        assert [step for step, _ in values] == [1, 2, 3, 4]
    losses = [(row["step"], row["validation_loss"]) for row in before if "validation_loss" in row]
    assert scalars["validation/loss"] == [(step, pytest.approx(loss, rel=1e-6)) for step, loss in losses]
    assert [step for step, _ in scalars["train/samples_per_second"]] == [1, 2, 3, 4]
    images = events_of(resumed).Images("samples/00")
    assert [(image.step, image.width, image.height) for image in images] == [(2, 16, 16), (4, 16, 16)]


def test_trackers_that_are_not_installed(autoencoder_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        "latentgen.train.distributed.find_spec", lambda name: None if name == "wandb" else find_spec(name)
    )
    config = autoencoder_recipe("trackers=[tensorboard, wandb]")
    with pytest.raises(ConfigError, match="wandb"):
        train(config)
    assert not config.output_dir.exists()


def test_the_progress_bar_continues_after_a_resume(
    autoencoder_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
):
    train(autoencoder_recipe("max_steps=3"))
    bars: list[dict[str, Any]] = []
    original = tqdm.close

    def close(self: Any) -> None:
        if self.desc == "autoencoder":
            bars.append({**self.format_dict, "postfix": self.postfix})
        original(self)

    monkeypatch.setattr(tqdm, "close", close)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    train(autoencoder_recipe("max_steps=5", "resume=true"))
    (bar, *_) = bars
    assert (bar["initial"], bar["n"], bar["total"]) == (3, 5, 5)
    assert all(name in bar["postfix"] for name in ("loss=", "lr=", "samples/s="))
