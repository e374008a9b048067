"""Whole runs of tiny recipes: they learn, stop, go on, and give the same however they are cut up."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from latentgen.errors import ConfigError, NumericalError, ResumeError
from latentgen.train import trainer
from latentgen.train.checkpoint import RunState, load_latest
from latentgen.train.config import TrainConfig
from latentgen.train.data import BatchIndices
from latentgen.train.data_loader import PlannedBatch
from latentgen.train.objectives.base import Loss
from latentgen.train.objectives.build import build_objective
from latentgen.train.trainer import Trainer, train
from tests.train.recipes import MakeRecipe
from tests.train.runs import assert_same_checkpoint, forget_accelerate, losses_of, rows_of

ROOT = Path(__file__).parents[2]


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


def test_resuming_at_any_step_changes_nothing(recipe: MakeRecipe, tmp_path: Path):
    # Dropout draws from torch's generator; two accumulated parts; a rate that falls in the second half.
    overrides = ["gradient_accumulation_steps=2"]
    if recipe().task.kind == "text_to_image":
        overrides.append("task.text_encoder.attention_dropout=0.2")
    whole = recipe(*overrides)
    train(whole)
    for step in (1, 2, 3):
        resumed = recipe(*overrides, "resume=true", f"output_dir={tmp_path / str(step)}")
        shutil.copytree(whole.output_dir, resumed.output_dir)
        shutil.rmtree(resumed.output_dir / "model")
        for later in range(step + 1, 5):
            shutil.rmtree(resumed.output_dir / f"checkpoint-{later:08d}")
        torch.manual_seed(step)
        train(resumed)
        for later in range(step + 1, 5):
            name = f"checkpoint-{later:08d}"
            assert_same_checkpoint(resumed.output_dir / name, whole.output_dir / name)
        assert rows_of(resumed) == rows_of(whole)
        for file in (whole.output_dir / "model").rglob("*.safetensors"):
            assert file.read_bytes() == (resumed.output_dir / file.relative_to(whole.output_dir)).read_bytes()


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


def test_a_finished_run_can_be_extended(autoencoder_recipe: MakeRecipe):
    train(autoencoder_recipe("max_steps=2"))
    train(autoencoder_recipe("max_steps=4", "resume=true"))
    assert load_latest(autoencoder_recipe().output_dir).step == 4


def test_the_model_is_the_moving_average(autoencoder_recipe: MakeRecipe):
    from safetensors.torch import load_file

    # With a frozen encoder nothing is normalised, so the file holds the averaged decoder as it is.
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


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulating_gradients_changes_no_loss(parts: int, recipe: MakeRecipe, tmp_path: Path):
    common = ("optimizer.name=adamw", "optimizer.learning_rate=0.001")
    whole = recipe(*common)
    split = recipe(*common, f"gradient_accumulation_steps={parts}", f"output_dir={tmp_path / 'split'}")
    train(whole)
    forget_accelerate()
    train(split)
    assert losses_of(split) == pytest.approx(losses_of(whole), rel=1e-4)
    weights, others = (load_latest(config.output_dir).weights for config in (whole, split))
    for name, weight in weights.items():
        torch.testing.assert_close(others[name], weight, atol=2e-4, rtol=1e-3)


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


def test_the_learning_rate_is_that_of_the_recipe(
    autoencoder_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
):
    config = autoencoder_recipe()
    rates: list[float] = []
    original = Trainer._update

    def update(self: Trainer, step: int, batches: Iterator[PlannedBatch]) -> dict[str, Tensor]:
        losses = original(self, step, batches)
        rates.append(self._optimizer.param_groups[0]["lr"])
        return losses

    monkeypatch.setattr(Trainer, "_update", update)
    train(config)
    assert rates == [config.optimizer.rate_at(step, 4) for step in range(4)] == [0.0015, 0.003, 0.003, 0.0015]


def test_a_text_encoder_has_a_learning_rate_of_its_own(lora_recipe: MakeRecipe, tmp_path: Path):
    """Factors of rate zero stay as they began, and those of the UNet take the same first step as with one rate."""
    began, states = [], []
    for rate in (0, "null"):
        config = lora_recipe(
            "optimizer.name=adamw",
            "optimizer.warmup_steps=0",
            f"optimizer.text_encoder_learning_rate={rate}",
            f"output_dir={tmp_path / str(rate)}",
        )
        accelerator = trainer.build_accelerator(config)
        torch.manual_seed(0)
        run = Trainer(config, accelerator, trainer.build_objective(config, device=accelerator.device))
        began.append({name: p.detach().clone() for name, p in run.trainable.items()})
        run.try_steps(count=0, seconds=0)
        states.append(run.trainable)
        forget_accelerate()
    zero, one = states
    text = {name for name in zero if name.startswith("text_encoder.")}
    assert text
    assert text < zero.keys()
    for name, parameter in zero.items():
        assert torch.equal(parameter, began[0][name] if name in text else one[name]), name
    assert not all(torch.equal(one[name], began[1][name]) for name in text)


def test_the_rate_of_a_text_encoder_follows_the_schedule(
    lora_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
):
    config = lora_recipe("optimizer.name=adamw", "optimizer.text_encoder_learning_rate=0.001")
    rates: list[list[float]] = []
    original = Trainer._update

    def update(self: Trainer, step: int, batches: Iterator[PlannedBatch]) -> dict[str, Tensor]:
        losses = original(self, step, batches)
        rates.append([group["lr"] for group in self._optimizer.param_groups])
        return losses

    monkeypatch.setattr(Trainer, "_update", update)
    train(config)
    assert rates == [[0.0015, 0.0005], [0.003, 0.001], [0.003, 0.001], [0.0015, 0.0005]]
    assert [row["learning_rate"] for row in rows_of(config)] == [unet for unet, _ in rates]


def spoil(tensor: Tensor) -> None:
    with torch.no_grad():
        tensor[(0,) * tensor.ndim] = float("nan")


def test_a_loss_that_is_not_finite_leaves_the_checkpoints(
    autoencoder_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
):
    config = autoencoder_recipe("log_every=1000", "keep_checkpoints=1")
    original = Trainer._update

    def update(self: Trainer, step: int, batches: Iterator[PlannedBatch]) -> dict[str, Tensor]:
        if step == 2:
            spoil(next(iter(self.trainable.values())))
        return original(self, step, batches)

    monkeypatch.setattr(Trainer, "_update", update)
    with pytest.raises(NumericalError, match="the loss is not finite at step 3"):
        train(config)
    assert load_latest(config.output_dir).step == 2


def test_weights_that_are_not_finite_are_not_saved(
    autoencoder_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
):
    config = autoencoder_recipe("keep_checkpoints=1")
    original = Trainer._update

    def update(self: Trainer, step: int, batches: Iterator[PlannedBatch]) -> dict[str, Tensor]:
        losses = original(self, step, batches)
        if step == 2:
            spoil(self.trainable["decoder.post_quant_conv.bias"])
        return losses

    monkeypatch.setattr(Trainer, "_update", update)
    with pytest.raises(NumericalError, match=r"decoder\.post_quant_conv\.bias is not finite after step 3"):
        train(config)
    assert load_latest(config.output_dir).step == 2


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_after_the_step(
    number: int, code: int, autoencoder_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    config = autoencoder_recipe("checkpoint_every=100")
    original = Trainer._loss

    def loss(self: Trainer, plan: BatchIndices, batch: tuple[Tensor, ...]) -> Loss:
        if plan.step == 1:
            signal.raise_signal(number)
        return original(self, plan, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_loss", loss)
        with pytest.raises(SystemExit) as ended:
            train(config)
    assert ended.value.code == code
    assert load_latest(config.output_dir).step == 2
    train(autoencoder_recipe("checkpoint_every=100", "resume=true"))
    whole = autoencoder_recipe("checkpoint_every=100", f"output_dir={tmp_path / 'whole'}")
    train(whole)
    last = "checkpoint-00000004"
    assert_same_checkpoint(config.output_dir / last, whole.output_dir / last)


def run_command(arguments: list[str], **environment: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, f"ended with {process.returncode}"
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_sigterm_to_the_command(autoencoder_recipe: MakeRecipe, tmp_path: Path):
    config = autoencoder_recipe()
    options = ["--set", "max_steps=100000", "--set", "checkpoint_every=100000"]
    with run_command(["latentgen.train", str(tmp_path / "recipe.yaml"), *options]) as process:
        log = config.output_dir / "log.jsonl"
        wait_until(lambda: log.is_file() and log.stat().st_size > 0, process)
        process.terminate()
        assert process.wait(timeout=300) == 143
    state = load_latest(config.output_dir)
    assert state.step == rows_of(config)[-1]["step"]
    assert not (config.output_dir / "model").exists()


def launch_two(tmp_path: Path, options: dict[str, object]) -> subprocess.Popen[bytes]:
    """Train the recipe in two processes."""
    launch = [
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--rdzv_backend=c10d",
        "--rdzv_endpoint=localhost:0",
    ]
    settings = [part for key, value in options.items() for part in ("--set", f"{key}={value}")]
    command = [*launch, "-m", "latentgen.train", str(tmp_path / "recipe.yaml"), *settings]
    return run_command(command, ACCELERATE_USE_CPU="true")


@pytest.mark.slow
def test_two_processes_train_as_one(recipe: MakeRecipe, tmp_path: Path):
    config = recipe("optimizer.name=adamw", "optimizer.learning_rate=0.001")
    train(config)
    options = {"optimizer.name": "adamw", "optimizer.learning_rate": 0.001, "output_dir": tmp_path / "two"}
    with launch_two(tmp_path, options) as process:
        assert process.wait(timeout=600) == 0
    other = recipe(f"output_dir={tmp_path / 'two'}")
    assert losses_of(other) == pytest.approx(losses_of(config), rel=1e-4)
    weights, others = (load_latest(folder).weights for folder in (config.output_dir, other.output_dir))
    for name, weight in weights.items():
        torch.testing.assert_close(others[name], weight, atol=2e-4, rtol=1e-3)
    # And on, in a single process.
    train(recipe("resume=true", "max_steps=6", *(f"{key}={value}" for key, value in options.items())))
    assert load_latest(other.output_dir).step == 6


@pytest.mark.slow
def test_two_processes_stop_at_the_same_step(autoencoder_recipe: MakeRecipe, tmp_path: Path):
    config = autoencoder_recipe()
    with launch_two(tmp_path, {"max_steps": 10**6, "checkpoint_every": 10**6}) as process:
        log = config.output_dir / "log.jsonl"
        wait_until(lambda: log.is_file() and log.stat().st_size > 0, process)
        process.terminate()  # which the launcher hands on to both, at different moments of their steps
        assert process.wait(timeout=300) != 0
    assert load_latest(config.output_dir).step == rows_of(config)[-1]["step"]


def test_a_checkpoint_of_other_parameters_is_refused_with_few_names(lora_recipe: MakeRecipe):
    config = lora_recipe("max_steps=1")
    train(config)
    forget_accelerate()
    other = lora_recipe("task.method.targets=[to_q]")
    trainer = Trainer(other, Accelerator(cpu=True), build_objective(other, device=torch.device("cpu")))
    names = r"\d+ extra \(unet[^;]+; ([^;]+; ){4}\.\.\.\);"
    with pytest.raises(ResumeError, match=names):
        trainer.restore(load_latest(config.output_dir))
