"""What the tests ask of runs that have ended."""

from __future__ import annotations

import json
from pathlib import Path

from latentgen.train.config import TrainConfig

WEIGHTS = ("weights.safetensors", "ema.safetensors", "optimizer.safetensors")


def log_of(config: TrainConfig) -> list[dict[str, float]]:
    """The rows of the log."""
    return [json.loads(row) for row in (config.output_dir / "log.jsonl").read_text("utf-8").splitlines()]


def losses_of(config: TrainConfig) -> list[float]:
    """The losses in the log."""
    return [row["loss"] for row in log_of(config)]


def assert_same_checkpoint(ours: Path, theirs: Path) -> None:
    """Weights, moving average and optimiser are the same bit for bit."""
    for name in WEIGHTS:
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name


def assert_same_model(ours: Path, theirs: Path) -> None:
    """Two finished models have the same files with the same bytes, but for the title of their cards."""
    names = sorted(file.relative_to(theirs) for file in theirs.rglob("*") if file.is_file())
    assert names == sorted(file.relative_to(ours) for file in ours.rglob("*") if file.is_file())
    for name in names:
        assert content_of(ours / name) == content_of(theirs / name), name


def content_of(file: Path) -> bytes:
    """The bytes of a file of a finished model; of its card all but the title, which names the run's folder."""
    title = f"\n# {file.parents[1].name}\n".encode()
    return file.read_bytes().replace(title, b"", 1) if file.name == "README.md" else file.read_bytes()


def forget_accelerate() -> None:
    """Accelerate keeps precision and accumulation for the whole process."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
