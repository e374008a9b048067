"""Checkpoints of a training run: folders of safetensors that are whole or not there.

A checkpoint `checkpoint-00001000/` holds the trainable weights, their moving average, the optimiser's state and
`state.json`. `manifest.json` is written last and carries the sha256 of every file: a folder without it, or whose files
do not match it, was cut off while it was written and is passed over.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from latentgen.errors import ResumeError
from latentgen.files import write_json
from latentgen.weights import save_weights

_NAME = re.compile(r"checkpoint-(\d{8})")
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class RunState:
    """All that a run needs to go on as if it had never stopped."""

    step: int
    config: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    ema: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as tensors named `<index of the parameter>.<name>`."""
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": torch.as_tensor(value)
        for index, values in state.items()
        for name, value in values.items()
        if value is not None
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `flatten_optimizer` took; hyperparameters stay as the optimiser was built."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, _, field = name.partition(".")
        parameter = parameters[int(index)]
        if tensor.shape == parameter.shape:
            # Fused kernels walk parameter and state side by side in memory: the state takes the parameter's strides.
            tensor = torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)
        state.setdefault(int(index), {})[field] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def save_checkpoint(output_dir: Path, state: RunState, *, keep: int) -> Path:
    """Write a checkpoint, verify it, and only then delete the oldest ones beyond `keep`."""
    folder = output_dir / f"checkpoint-{state.step:08d}"
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    for stem in ("weights", "ema", "optimizer"):
        tensors = getattr(state, stem)
        if tensors:
            save_weights(tensors, folder, stem)
    write_json(folder / "state.json", {"step": state.step, "config": dict(state.config)})
    write_json(folder / MANIFEST, {file.name: _sha256(file) for file in sorted(folder.iterdir())})
    if _is_whole(folder):
        for old in _folders(output_dir)[:-keep]:
            shutil.rmtree(old)
    return folder


def load_latest(output_dir: Path) -> RunState:
    """The newest whole checkpoint of a run.

    Raises:
        ResumeError: there is none.
    """
    for folder in reversed(_folders(output_dir)):
        if not _is_whole(folder):
            warnings.warn(f"{folder} is not whole and is passed over", stacklevel=2)
            continue
        state = json.loads((folder / "state.json").read_text("utf-8"))
        files = {stem: folder / f"{stem}.safetensors" for stem in ("weights", "ema", "optimizer")}
        tensors = {stem: load_file(file) if file.is_file() else {} for stem, file in files.items()}
        return RunState(step=state["step"], config=state["config"], **tensors)
    raise ResumeError(
        f"nothing to resume in {output_dir}: it holds no whole checkpoint; start without resume"
    )


def _folders(output_dir: Path) -> list[Path]:
    if not output_dir.is_dir():
        return []
    return sorted(folder for folder in output_dir.iterdir() if _NAME.fullmatch(folder.name))


def _is_whole(folder: Path) -> bool:
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return False
    sums = json.loads(manifest.read_text("utf-8"))
    return all(
        (folder / name).is_file() and _sha256(folder / name) == digest for name, digest in sums.items()
    )


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
