"""The metrics of a run: the rows of `log.jsonl`, the progress bar, and trackers such as TensorBoard."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from latentgen.errors import NumericalError, OutputError
from latentgen.files import atomic_write, quote
from latentgen.train.config import TrainConfig
from latentgen.train.objectives.base import Subset

LOG = "log.jsonl"
NAN_ADVICE = (
    "lower optimizer.learning_rate, or train with mixed_precision bf16 or no; the last checkpoint is intact"
)
# Keys of an unfinished row in checkpoints: the number of its steps; and, appended to the name of a metric over a subset
# of the samples, the number of these samples.
_STEPS = "steps"
_COUNT = ": samples"
_GRAD_NORM = "grad_norm"
# In older checkpoints: the number of steps with a finite gradient norm.
_OLD_GRAD_NORM_COUNT = "finite norms"


class Metrics:
    """The metrics of one run.

    A row of `log.jsonl` holds the means since the previous row, over all steps and processes. The metric of a subset of
    the samples is a mean over those samples, and left out if there were none. Rows hold no times, so that the log
    depends only on the recipe; the progress bar and the trackers also get the samples per second.

    Attributes:
        progress: the values in the progress bar, by name.
    """

    def __init__(self, config: TrainConfig, accelerator: Accelerator) -> None:
        self._config = config
        self._accelerator = accelerator
        self._file = config.output_dir / LOG
        self._totals: dict[str, Tensor] = {}
        self._steps = 0
        self._steps_since = 0  # steps of this process since the time _since
        self._since = time.monotonic()
        self.progress: dict[str, str] = {}

    def start(self, step: int) -> None:
        """Start the trackers at `step`, and drop later steps from the log and TensorBoard.

        Raises:
            OutputError: the log cannot be written; it is unchanged.
        """
        if self._accelerator.is_main_process:
            trim_log(self._file, step)
        if not self._config.trackers:
            return
        folder, recipe = self._config.output_dir, self._config.model_dump(mode="json")
        wandb = {"name": folder.name, "dir": str(folder), "config": recipe}
        options = {"tensorboard": {"purge_step": step + 1}, "wandb": wandb}
        self._accelerator.init_trackers("latentgen", init_kwargs=options)

    def add(self, means: Mapping[str, Tensor], subsets: Mapping[str, Subset] | None = None) -> None:
        """Add the metrics of one step, scalars on the device, without waiting for the device."""
        totals, subsets = dict(means), dict(subsets or {})
        if (norm := totals.pop(_GRAD_NORM, None)) is not None:
            # In float16 gradients overflow now and then, harmlessly: such steps have no norm.
            is_finite = norm.isfinite()
            subsets[_GRAD_NORM] = Subset(torch.where(is_finite, norm, 0), is_finite.float())
        for name, (total, count) in subsets.items():
            totals |= {name: total, name + _COUNT: count}
        for name, total in totals.items():
            self._totals[name] = self._totals[name] + total if name in self._totals else total.clone()
        self._steps += 1
        self._steps_since += 1

    def is_row_due(self, step: int) -> bool:
        """Whether a row ends with this step."""
        config = self._config
        return step % config.log_every == 0 or step % config.checkpoint_every == 0 or step == config.max_steps

    def write_row(self, step: int, learning_rate: float) -> None:
        """End a row; every process must call it.

        Raises:
            NumericalError: a loss is not finite.
            OutputError: the log cannot be written.
        """
        totals = self.unfinished_row(step)
        steps = totals.pop(_STEPS)
        counts = {
            name: totals.pop(name + _COUNT, steps) for name in list(totals) if not name.endswith(_COUNT)
        }
        row = {name: total / counts[name] for name, total in totals.items() if counts[name]}
        row["learning_rate"] = learning_rate
        speed = self._steps_since * self._config.batch_size / max(time.monotonic() - self._since, 1e-9)
        self._totals, self._steps, self._steps_since = {}, 0, 0
        self._since = time.monotonic()
        loss, rate = f"{row['loss']:.4g}", f"{learning_rate:.3g}"
        self.progress = {"loss": loss, "lr": rate, "samples/s": f"{speed:.3g}"}
        self._append(step, row)
        tracked = {f"train/{name}": value for name, value in row.items()}
        self._accelerator.log({**tracked, "train/samples_per_second": speed}, step=step)

    def exclude_time(self, seconds: float) -> None:
        """Exclude a pause of training from the samples per second."""
        self._since += seconds

    def write_validation(self, step: int, loss: float, parts: Mapping[str, float]) -> None:
        """Add a row with the validation loss; the trackers also get its parts."""
        self.progress["validation"] = f"{loss:.4g}"
        self._append(step, {"validation_loss": loss})
        tracked = {f"validation/{name}": value for name, value in {"loss": loss, **parts}.items()}
        self._accelerator.log(tracked, step=step)

    def has_validation(self, step: int) -> bool:
        """Whether the log has the validation loss of this step."""
        rows = self._file.read_text("utf-8").splitlines() if self._file.is_file() else []
        return any(row["step"] == step and "validation_loss" in row for row in map(json.loads, rows))

    def log_images(self, step: int, rows: Sequence[Sequence[Image.Image]]) -> None:
        """Send rows of images to the trackers, such as those of each prompt."""
        for tracker in self._accelerator.trackers:
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            for number, images in enumerate(rows):
                pixels = np.stack([np.asarray(image) for image in images])
                tracker.log_images({f"samples/{number:02d}": pixels}, step=step, **layout)

    def unfinished_row(self, step: int) -> dict[str, float]:
        """The sums since the last row, for a checkpoint; every process must call it.

        Raises:
            NumericalError: a loss is not finite.
        """
        if not self._steps:
            return {}
        means: Any = self._accelerator.reduce(dict(self._totals), "mean")
        totals = {name: float(total) for name, total in means.items()}
        if not all(map(math.isfinite, totals.values())):
            before = f" or the {self._steps - 1} before it" if self._steps > 1 else ""
            raise NumericalError(f"the loss is not finite at step {step}{before}: {totals}; {NAN_ADVICE}")
        return {_STEPS: float(self._steps), **totals}

    def restore(self, unfinished_row: Mapping[str, float]) -> None:
        """Continue the row of a checkpoint."""
        totals = dict(unfinished_row)
        self._steps = int(totals.pop(_STEPS, 0))
        if _OLD_GRAD_NORM_COUNT in totals:
            totals[_GRAD_NORM + _COUNT] = totals.pop(_OLD_GRAD_NORM_COUNT)
        device = self._accelerator.device
        self._totals = {name: torch.tensor(total, device=device) for name, total in totals.items()}

    def sync(self) -> None:
        """Wait until the rows are on the disk: after a power cut no checkpoint may be newer than the log.

        Raises:
            OutputError: they cannot be written.
        """
        try:
            with self._file.open("rb") as file:
                os.fsync(file.fileno())
        except FileNotFoundError:
            return  # checkpoints are more frequent than rows
        except OSError as error:
            raise _cannot_write(self._file, error) from error

    def _append(self, step: int, values: Mapping[str, float]) -> None:
        """Add a row; if only a part of it is written, `trim_log` drops that part later."""
        if not self._accelerator.is_main_process:
            return
        # JSON has no infinity, which the validation loss of a diverged run can be.
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        try:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **finite}) + "\n")
        except OSError as error:
            raise _cannot_write(self._file, error) from error


def trim_log(log: Path, step: int) -> None:
    """Drop the rows of steps after `step`, which will be trained again, and truncated rows.

    Raises:
        OutputError: the log cannot be written; it is unchanged.
    """
    if not log.is_file():
        return
    rows = log.read_text("utf-8", errors="replace").splitlines(keepends=True)
    with atomic_write(log) as file:
        file.writelines(row.encode() for row in rows if _step_of(row) <= step)


def _cannot_write(log: Path, error: OSError) -> OutputError:
    return OutputError(
        f"cannot write {quote(log)}: {error.strerror or error}; the last checkpoint is intact: free some space or "
        "choose a folder that can be written"
    )


def _step_of(row: str) -> float:
    try:
        return json.loads(row)["step"]
    except (ValueError, TypeError, KeyError):
        return math.inf  # truncated
