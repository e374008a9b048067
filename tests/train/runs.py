"""Starts runs, acts within them, and reads and compares their files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from latentgen.train.config import TrainConfig
from latentgen.train.data_loader import PlannedBatch
from latentgen.train.trainer import Trainer

ROOT = Path(__file__).parents[2]
WEIGHTS = ("weights.safetensors", "ema.safetensors", "optimizer.safetensors")


def rows_of(config: TrainConfig) -> list[dict[str, Any]]:
    """The rows of a run's log."""
    return [json.loads(row) for row in (config.output_dir / "log.jsonl").read_text("utf-8").splitlines()]


def events_of(config: TrainConfig) -> Any:
    """The events of a run that TensorBoard reads."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(config.output_dir / "tensorboard" / "latentgen"))
    events.Reload()
    return events


def scalars_of(config: TrainConfig) -> dict[str, list[tuple[int, float]]]:
    """Tag -> steps and values, as TensorBoard shows them; a step that was logged twice is there twice."""
    events = events_of(config)
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


def files_of(folder: Path) -> dict[Path, bytes]:
    """All files below a folder, by their relative paths."""
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def losses_of(config: TrainConfig) -> list[float]:
    """The losses in the log."""
    return [row["loss"] for row in rows_of(config)]


def assert_same_checkpoint(ours: Path, theirs: Path) -> None:
    """Weights, optimizer, and the moving average if there is one, are equal to the bit."""
    names = [name for name in WEIGHTS if (theirs / name).is_file()]
    assert names == [name for name in WEIGHTS if (ours / name).is_file()]
    for name in names:
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name


def assert_same_model(ours: Path, theirs: Path) -> None:
    """Two trained models have the same files with the same bytes, except for the titles of their cards."""
    names = sorted(file.relative_to(theirs) for file in theirs.rglob("*") if file.is_file())
    assert names == sorted(file.relative_to(ours) for file in ours.rglob("*") if file.is_file())
    for name in names:
        assert content_of(ours / name) == content_of(theirs / name), name


def content_of(file: Path) -> bytes:
    """The bytes of a file of a trained model; its card without the title, which names the run's folder."""
    title = f"\n# {file.parents[1].name}\n".encode()
    return file.read_bytes().replace(title, b"", 1) if file.name == "README.md" else file.read_bytes()


def copy_until(step: int, run: TrainConfig, folder: Path) -> None:
    """Copy the folder of a run as if it was killed some time after the checkpoint of `step`: its log is longer."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(run.output_dir, folder, ignore=shutil.ignore_patterns("checkpoint-*", "model", ".lock"))
    name = f"checkpoint-{step:08d}"
    shutil.copytree(run.output_dir / name, folder / name)


def on_step(
    monkeypatch: pytest.MonkeyPatch,
    *,
    before: Callable[[Trainer, int], object] = lambda *_: None,
    after: Callable[[Trainer, int], object] = lambda *_: None,
) -> None:
    """Call these with the trainer and the number of the step, before and after each step of a run."""
    original = Trainer._update

    def update(self: Trainer, step: int, batches: Iterator[PlannedBatch]) -> Any:
        before(self, step)
        losses = original(self, step, batches)
        after(self, step)
        return losses

    monkeypatch.setattr(Trainer, "_update", update)


def run_command(arguments: list[str], **environment: str) -> subprocess.Popen[bytes]:
    """Start `python -m ARGUMENTS`."""
    return subprocess.Popen(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def launch_two(recipe: Path, overrides: tuple[str, ...]) -> subprocess.Popen[bytes]:
    """Train a recipe in two processes, with torch's launcher."""
    launch = [
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--rdzv_backend=c10d",
        "--rdzv_endpoint=localhost:0",
    ]
    settings = [part for override in overrides for part in ("--set", override)]
    return run_command([*launch, "-m", "latentgen.train", str(recipe), *settings], ACCELERATE_USE_CPU="true")


def wait_for_log(config: TrainConfig, process: subprocess.Popen[Any]) -> None:
    """Wait until a run in another process has logged a step."""
    log = config.output_dir / "log.jsonl"
    deadline = time.monotonic() + 300
    while not (log.is_file() and log.stat().st_size > 0):
        assert process.poll() is None, f"ended with {process.returncode}"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def forget_accelerate() -> None:
    """Reset the precision and accumulation that Accelerate keeps for the whole process."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
