"""Whole runs of tiny recipes: they learn, stop, continue, and do not depend on how the work is divided."""

from __future__ import annotations

import math
import shutil
import signal
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn

from latentgen.errors import ConfigError, NumericalError, ResumeError
from latentgen.train import trainer
from latentgen.train.checkpoint import RunState, load_latest
from latentgen.train.config import TrainConfig
from latentgen.train.data import CaptionedDataset
from latentgen.train.objectives import build_objective
from latentgen.train.objectives.base import Loss, Objective
from latentgen.train.trainer import Trainer, train
from tests.train.recipes import MakeRecipe
from tests.train.runs import (
    assert_same_checkpoint,
    forget_accelerate,
    losses_of,
    on_step,
    rows_of,
    run_command,
    wait_for_log,
)


@pytest.fixture(params=["autoencoder_recipe", "text_to_image_recipe", "upscale_recipe", "paired_recipe"])
def recipe(request: pytest.FixtureRequest) -> MakeRecipe:
    """Each of the tasks in turn."""
    return request.getfixturevalue(request.param)


def test_the_loss_falls(recipe: MakeRecipe):
    config = recipe("max_steps=40", "batch_size=6", "checkpoint_every=40")
    assert train(config) == config.output_dir / "model"
    losses = losses_of(config)
    assert len(losses) == 40
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])


class Denoiser(Objective):
    """The example in the docstring of Objective."""

    def __init__(self, data: CaptionedDataset) -> None:
        super().__init__(data)
        self.network = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, *batch: Tensor) -> Loss:
        (images,) = batch
        return Loss((self.network(images + 0.1 * torch.randn_like(images)) - images).square().mean(), {})


def test_an_objective_of_one_loss_is_trained_validated_and_saved(
    autoencoder_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(trainer, "build_objective", lambda _, *, data, **__: Denoiser(data))
    validation = ("validation_fraction=0.34", "validation={loss_every: 10}")
    config = autoencoder_recipe("max_steps=20", "ema_decay=0", *validation)
    model = train(config)
    losses = [row["loss"] for row in rows_of(config) if "loss" in row]
    assert losses[-1] < 0.9 * losses[0]
    assert [row["step"] for row in rows_of(config) if "validation_loss" in row] == [10, 20]
    weights = load_latest(config.output_dir).weights
    for name, weight in load_file(model / "model.safetensors").items():
        assert torch.equal(weight, weights[name])
    assert "kind: autoencoder" in (model / "README.md").read_text("utf-8")


@pytest.mark.slow
def test_compiling_changes_no_loss(recipe: MakeRecipe, tmp_path: Path):
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    plain = recipe("max_steps=3")
    compiled = recipe("max_steps=3", "compile=true", f"output_dir={tmp_path / 'compiled'}")
    train(plain)
    train(compiled)
    assert losses_of(compiled) == pytest.approx(losses_of(plain), rel=1e-4)
    ours, theirs = (load_latest(config.output_dir).weights for config in (compiled, plain))
    assert ours.keys() == theirs.keys()


def test_the_model_is_the_moving_average(autoencoder_recipe: MakeRecipe):
    # With a frozen encoder nothing is normalized, so the file holds the averaged decoder as it is.
    first = autoencoder_recipe("max_steps=1")
    model = train(first)
    tuned = autoencoder_recipe(
        f"output_dir={first.output_dir}2", f"init_from={model}", "task.train_encoder=false"
    )
    train(tuned)
    state = load_latest(tuned.output_dir)
    assert all(name.startswith("decoder.") for name in state.weights)
    saved = load_file(tuned.output_dir / "model" / "vae" / "diffusion_pytorch_model.safetensors")
    for name, average in state.ema.items():
        assert torch.equal(saved[name.removeprefix("decoder.")], average)
        assert not torch.equal(state.weights[name], average)


def test_the_average_follows_its_formula(autoencoder_recipe: MakeRecipe):
    config = autoencoder_recipe("ema_decay=0.25", "max_steps=6")
    train(config)
    folders = sorted(config.output_dir.glob("checkpoint-*"))
    states = [load_state(config, folder) for folder in folders]
    name = next(iter(states[0].weights))
    for step, (before, after) in enumerate(pairwise(states), start=1):
        decay = min(0.25, (1 + step) / (10 + step))
        expected = decay * before.ema[name] + (1 - decay) * after.weights[name]
        torch.testing.assert_close(after.ema[name], expected)


def load_state(config: TrainConfig, folder: Path) -> RunState:
    """One checkpoint out of several."""
    alone = config.output_dir.parent / "alone"
    shutil.rmtree(alone, ignore_errors=True)
    shutil.copytree(folder, alone / folder.name)
    return load_latest(alone)


def test_a_used_folder_is_refused_before_anything_is_built(
    autoencoder_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
):
    train(autoencoder_recipe("max_steps=1"))
    monkeypatch.setattr(trainer, "build_objective", lambda *_, **__: pytest.fail("built"))
    with pytest.raises(ResumeError, match="already holds a run"):
        train(autoencoder_recipe())


def test_accumulating_gradients_changes_no_loss(recipe: MakeRecipe, tmp_path: Path):
    common = ("optimizer.name=adamw", "optimizer.learning_rate=0.001")
    whole = recipe(*common)
    split = recipe(*common, "gradient_accumulation_steps=4", f"output_dir={tmp_path / 'split'}")
    train(whole)
    forget_accelerate()
    train(split)
    assert losses_of(split) == pytest.approx(losses_of(whole), rel=1e-4)
    weights, others = (load_latest(config.output_dir).weights for config in (whole, split))
    for name, weight in weights.items():
        torch.testing.assert_close(others[name], weight, atol=2e-4, rtol=1e-3)


def test_accumulating_gradients_over_buckets_changes_no_loss(bucket_recipe: MakeRecipe, tmp_path: Path):
    whole = bucket_recipe("max_steps=6")
    split = bucket_recipe("max_steps=6", "gradient_accumulation_steps=2", f"output_dir={tmp_path / 'split'}")
    train(whole)
    forget_accelerate()
    train(split)
    assert losses_of(split) == pytest.approx(losses_of(whole), rel=1e-4)


def test_the_environment_does_not_change_the_accumulation(
    autoencoder_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "3")
    seen: list[int] = []
    original = Trainer.run

    def run(self: Trainer) -> None:
        seen.append(self.accelerator.gradient_accumulation_steps)
        original(self)

    monkeypatch.setattr(Trainer, "run", run)
    train(autoencoder_recipe("gradient_accumulation_steps=2", "max_steps=1"))
    assert seen == [2]


def test_bf16(recipe: MakeRecipe, tmp_path: Path):
    full, half = recipe(), recipe("mixed_precision=bf16", f"output_dir={tmp_path / 'half'}")
    train(full)
    forget_accelerate()
    train(half)
    assert losses_of(half) == pytest.approx(losses_of(full), rel=0.03)
    assert losses_of(half) != losses_of(full)
    state = load_latest(half.output_dir)
    tensors = [*state.weights.values(), *state.ema.values(), *state.optimizer.values()]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}


def test_fp16_needs_an_accelerator(autoencoder_recipe: MakeRecipe):
    if torch.accelerator.is_available():
        pytest.skip("this machine has an accelerator")
    with pytest.raises(ConfigError, match="fp16 needs an accelerator"):
        train(autoencoder_recipe("mixed_precision=fp16"))


def test_the_batch_is_divided_evenly(autoencoder_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Accelerator, "num_processes", 3)
    with pytest.raises(
        ConfigError, match="batch_size 4 is not a multiple of 2 gradient_accumulation_steps x 3"
    ):
        train(autoencoder_recipe("gradient_accumulation_steps=2"))


def test_the_rates_of_the_unet_and_of_a_text_encoder_follow_the_schedule(
    lora_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
):
    config = lora_recipe("optimizer.name=adamw", "optimizer.text_encoder_learning_rate=0.001")
    rates: list[list[float]] = []

    def note_rates(run: Trainer, _: int) -> None:
        unet, text = run._optimizer.param_groups
        rates.append([unet["lr"], text["lr"]])
        for group, name in ((unet, "unet."), (text, "text_encoder.")):
            assert len(group["params"]) == sum(key.startswith(name) for key in run.trainable)

    on_step(monkeypatch, after=note_rates)
    train(config)
    assert rates == [[0.0015, 0.0005], [0.003, 0.001], [0.003, 0.001], [0.0015, 0.0005]]
    assert [unet for unet, _ in rates] == [config.optimizer.rate_at(step, 4) for step in range(4)]
    assert [row["learning_rate"] for row in rows_of(config)] == [unet for unet, _ in rates]


@pytest.mark.parametrize(("when", "name"), [("before", "loss"), ("after", r"decoder\.post_quant_conv\.bias")])
def test_values_that_are_not_finite_are_not_saved(
    when: str, name: str, autoencoder_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
):
    config = autoencoder_recipe("log_every=1000", "keep_checkpoints=1")

    def spoil(run: Trainer, step: int) -> None:
        if step == 2:
            torch.nn.init.constant_(run.trainable["decoder.post_quant_conv.bias"], math.nan)

    on_step(monkeypatch, **{when: spoil})
    with pytest.raises(NumericalError, match=rf"{name} is not finite .*step 3"):
        train(config)
    assert load_latest(config.output_dir).step == 2


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_after_the_step(
    number: int, code: int, autoencoder_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    whole = autoencoder_recipe("checkpoint_every=100", f"output_dir={tmp_path / 'whole'}")
    train(whole)
    config = autoencoder_recipe("checkpoint_every=100")
    on_step(monkeypatch, before=lambda _, step: signal.raise_signal(number) if step == 1 else None)
    with pytest.raises(SystemExit) as ended:
        train(config)
    assert ended.value.code == code
    assert load_latest(config.output_dir).step == 2
    train(autoencoder_recipe("checkpoint_every=100", "resume=true"))
    last = "checkpoint-00000004"
    assert_same_checkpoint(config.output_dir / last, whole.output_dir / last)
    # A run that is killed between its last checkpoint and the deletion of an old one deletes it when it is resumed.
    shutil.copytree(config.output_dir / last, config.output_dir / "checkpoint-00000003")
    train(autoencoder_recipe("checkpoint_every=100", "resume=true", "keep_checkpoints=1"))
    assert [folder.name for folder in config.output_dir.glob("checkpoint-*")] == [last]


def test_sigterm_to_the_command(autoencoder_recipe: MakeRecipe, tmp_path: Path):
    config = autoencoder_recipe()
    options = ["--set", "max_steps=100000", "--set", "checkpoint_every=100000"]
    with run_command(["latentgen.train", str(tmp_path / "recipe.yaml"), *options]) as process:
        wait_for_log(config, process)
        process.terminate()
        assert process.wait(timeout=300) == 143
    state = load_latest(config.output_dir)
    assert state.step == rows_of(config)[-1]["step"]
    assert not (config.output_dir / "model").exists()


def test_a_checkpoint_of_other_parameters_is_refused_with_few_names(lora_recipe: MakeRecipe):
    config = lora_recipe("max_steps=1")
    train(config)
    forget_accelerate()
    other = lora_recipe("task.method.targets=[to_q]")
    trainer = Trainer(other, Accelerator(cpu=True), build_objective(other, device=torch.device("cpu")))
    with pytest.raises(ResumeError, match=r"\d+ parameters.*: unet[^;]+; ([^;]+; ){4}\.\.\.;"):
        trainer.restore(load_latest(config.output_dir))
