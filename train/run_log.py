"""What is told of a run: the rows of `log.jsonl`, the progress bar, and trackers such as TensorBoard."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from latentgen.errors import NumericalError
from latentgen.train.config import TrainConfig
from latentgen.train.objectives.base import Subset
from latentgen.train.run_files import LOG, append_row

AFTER_NAN = (
    "lower optimizer.learning_rate, or train with mixed_precision bf16 or no; the last checkpoint is intact"
)
_GRAD_NORM = "grad_norm"
_STEPS = "steps"
# In float16 gradients overflow now and then, without harm: such steps have no norm.
_FINITE_NORMS = "finite norms"
# After the name of what is told of a subset of the samples alone: how many they are.
_COUNT = ": samples"


class RunLog:
    """The log of one run.

    A row holds the means over all steps since the row before, over all processes: one batch says little. What is told
    of a subset of the samples is a mean over those of all these steps, and left out if there was none. A row holds no
    time, so that the log is a function of the recipe; the bar and the trackers are told the samples per second as well.

    Attributes:
        shown: what the progress bar is to show.
    """

    def __init__(self, config: TrainConfig, accelerator: Accelerator) -> None:
        self._config = config
        self._accelerator = accelerator
        self._sums: dict[str, Tensor] = {}
        self._steps = 0
        self._fresh_steps = 0
        self._since = time.monotonic()
        self.shown: dict[str, str] = {}

    def open(self, step: int) -> None:
        """Start the trackers at `step`: what they were told of later steps will be told again."""
        if not self._config.trackers:
            return
        self._accelerator.init_trackers(
            "latentgen",
            init_kwargs={
                "tensorboard": {"purge_step": step + 1},
                "wandb": {
                    "name": self._config.output_dir.name,
                    "dir": str(self._config.output_dir),
                    "config": self._config.model_dump(mode="json"),
                },
            },
        )

    def add(self, values: Mapping[str, Tensor], subsets: Mapping[str, Subset] | None = None) -> None:
        """Take what one step gave, as means and of subsets of the samples, without waiting for the device."""
        values = dict(values)
        for name, (total, count) in (subsets or {}).items():
            values |= {name: total, name + _COUNT: count}
        if _GRAD_NORM in values:
            norm = values[_GRAD_NORM]
            values[_GRAD_NORM] = torch.where(norm.isfinite(), norm, 0)
            values[_FINITE_NORMS] = norm.isfinite().float()
        for name, value in values.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()
        self._steps += 1
        self._fresh_steps += 1

    def is_due(self, step: int) -> bool:
        """Whether a row ends with this step."""
        config = self._config
        return step % config.log_every == 0 or step % config.checkpoint_every == 0 or step == config.max_steps

    def write(self, step: int, learning_rate: float) -> None:
        """End a row; every process must call it.

        Raises:
            NumericalError: a loss was not finite.
        """
        window = self.window(step)
        steps, norms = window.pop(_STEPS), window.pop(_FINITE_NORMS, 0.0)
        norm = window.pop(_GRAD_NORM, 0.0)
        counts = {
            name: window.pop(name + _COUNT, steps) for name in list(window) if not name.endswith(_COUNT)
        }
        row = {name: total / counts[name] for name, total in window.items() if counts[name]}
        row["learning_rate"] = learning_rate
        if norms:
            row[_GRAD_NORM] = norm / norms
        speed = self._fresh_steps * self._config.batch_size / max(time.monotonic() - self._since, 1e-9)
        self._sums, self._steps, self._fresh_steps = {}, 0, 0
        self._since = time.monotonic()
        self.shown = {
            "loss": f"{row['loss']:.4g}",
            "lr": f"{learning_rate:.3g}",
            "samples/s": f"{speed:.3g}",
        }
        self._append(step, row)
        told = {f"train/{name}": value for name, value in row.items()}
        self._accelerator.log({**told, "train/samples_per_second": speed}, step=step)

    def leave_out(self, seconds: float) -> None:
        """Do not count this time, in which nothing was trained, towards the speed."""
        self._since += seconds

    def write_validation(self, step: int, total: float, parts: Mapping[str, float]) -> None:
        """Add a row with the validation loss; the trackers are told its parts as well."""
        self.shown["validation"] = f"{total:.4g}"
        self._append(step, {"validation_loss": total})
        told = {f"validation/{name}": value for name, value in {"loss": total, **parts}.items()}
        self._accelerator.log(told, step=step)

    def has_validation(self, step: int) -> bool:
        """Whether there is a row with the validation loss of this step."""
        log = self._config.output_dir / LOG
        rows = log.read_text("utf-8").splitlines() if log.is_file() else []
        return any(row["step"] == step and "validation_loss" in row for row in map(json.loads, rows))

    def write_images(self, step: int, rows: Sequence[Sequence[Image.Image]]) -> None:
        """Show the trackers the images of each prompt."""
        for tracker in self._accelerator.trackers:
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            for number, images in enumerate(rows):
                pixels = np.stack([np.asarray(image) for image in images])
                tracker.log_images({f"samples/{number:02d}": pixels}, step=step, **layout)

    def window(self, step: int) -> dict[str, float]:
        """The sums over the steps that no row tells of yet, and their number; every process must call it.

        Raises:
            NumericalError: a loss was not finite.
        """
        if not self._steps:
            return {}
        means: Any = self._accelerator.reduce(dict(self._sums), "mean")
        sums = {name: float(total) for name, total in means.items()}
        if not all(map(math.isfinite, sums.values())):
            before = f" or the {self._steps - 1} before it" if self._steps > 1 else ""
            raise NumericalError(f"the loss is not finite at step {step}{before}: {sums}; {AFTER_NAN}")
        return {_STEPS: float(self._steps), **sums}

    def restore(self, window: Mapping[str, float]) -> None:
        """Go on with the row that `window` gave the beginning of."""
        sums = dict(window)
        self._steps = int(sums.pop(_STEPS, 0))
        self._sums = {
            name: torch.tensor(total, device=self._accelerator.device) for name, total in sums.items()
        }

    def _append(self, step: int, values: Mapping[str, float]) -> None:
        if not self._accelerator.is_main_process:
            return
        # JSON knows no infinity, which the validation loss of a run that has gone astray can be.
        told = {name: value if math.isfinite(value) else None for name, value in values.items()}
        append_row(self._config.output_dir, {"step": step, **told})
