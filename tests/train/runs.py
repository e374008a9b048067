"""Reads and compares the files of runs that have ended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from latentgen.train.config import TrainConfig

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
    """Weights, moving average and optimizer are equal to the bit."""
    for name in WEIGHTS:
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


def forget_accelerate() -> None:
    """Reset the precision and accumulation that Accelerate keeps for the whole process."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
