"""Checkpoints of a training run: folders of safetensors, complete or absent.

A checkpoint `checkpoint-00001000/` holds the trainable weights, their moving average, the optimizer's state and
`state.json`. `manifest.json` is written last and carries the sha256 of every file. The folder appears under its name
when all of it is on the disk; one without a manifest, or whose files do not match it, was damaged later and is skipped.
"""

from __future__ import annotations

import hashlib
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from latentgen.checkpoints.weights import save_weights
from latentgen.errors import CheckpointError, OutputError, ResumeError
from latentgen.files import atomic_folder, quote, read_json, remove_folder, write_json
from latentgen.train.distributed import shard_like

MANIFEST = "manifest.json"
_STATE = "state.json"
_NAME = re.compile(r"checkpoint-(\d{8,})")


@dataclass(frozen=True)
class RunState:
    """All that a run needs to continue as if it had never stopped.

    Attributes:
        step: optimizer steps done.
        config: the recipe, as JSON.
        weights: the trainable parameters by name.
        ema: their moving average; empty if the recipe has none.
        optimizer: from `flatten_optimizer`.
        scaler: the state of float16's loss scaling; empty without it.
        processes: how many trained together; None if unknown.
        unfinished_row: the sums of the row of the log that is not written yet; see Metrics.
        data_digest: the digest of the training data; None if unknown.
    """

    step: int
    config: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    ema: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    scaler: Mapping[str, Any]
    processes: int | None = None
    unfinished_row: Mapping[str, float] = field(default_factory=dict)
    data_digest: str | None = None


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as tensors named `<index of the parameter>.<name>`."""
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": torch.as_tensor(value)
        for index, values in state.items()
        for name, value in values.items()
        if value is not None
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Load what `flatten_optimizer` returned; hyperparameters stay as the optimizer was built."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = _SavedState(parameters, tensors)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


class _SavedState(Mapping[int, dict[str, Tensor]]):
    """The state of each parameter, by its index, built on access: not all may fit into memory at once."""

    def __init__(self, parameters: Sequence[Tensor], tensors: Mapping[str, Tensor]) -> None:
        self._parameters = parameters
        self._tensors: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            index, _, field = name.partition(".")
            self._tensors.setdefault(int(index), {})[field] = tensor

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        parameter = self._parameters[index]
        return {name: _to_layout_of(parameter, tensor) for name, tensor in self._tensors[index].items()}

    def __contains__(self, index: object) -> bool:
        return index in self._tensors

    def __iter__(self) -> Iterator[int]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _to_layout_of(parameter: Tensor, tensor: Tensor) -> Tensor:
    """A tensor of optimizer state on the device of its parameter, with its sharding and strides."""
    if tensor.shape != parameter.shape:
        return tensor
    # Fused kernels read parameter and state in the same memory order.
    return torch.empty_like(parameter, dtype=tensor.dtype).copy_(shard_like(parameter, tensor))


def save_checkpoint(output_dir: Path, state: RunState, *, keep: int) -> Path:
    """Write a checkpoint and read it back; then delete all but the newest `keep`.

    Raises:
        OutputError: it cannot be written, or does not read back; the older ones are intact.
    """
    folder = output_dir / f"checkpoint-{state.step:08d}"
    with atomic_folder(folder, replace=True) as written:  # an existing one of this step is damaged
        for stem, tensors in (("weights", state.weights), ("ema", state.ema), ("optimizer", state.optimizer)):
            if tensors:
                save_weights(tensors, written, stem, max_shard_bytes=sys.maxsize)
        optional = {
            "scaler": dict(state.scaler) or None,
            "processes": state.processes,
            "window": dict(state.unfinished_row) or None,
            "data_digest": state.data_digest,
        }
        known = {name: value for name, value in optional.items() if value is not None}
        write_json(written / _STATE, {"step": state.step, "config": dict(state.config), **known})
        write_json(written / MANIFEST, {file.name: _sha256(file) for file in sorted(written.iterdir())})
        if not _is_complete(written):
            raise OutputError(f"{quote(folder)} does not read back as it was written; check the disk")
    delete_old_checkpoints(output_dir, state.step, keep)
    return folder


def load_latest(output_dir: Path) -> RunState:
    """The newest complete checkpoint of a run, on the CPU.

    Raises:
        ResumeError: there is none.
    """
    for _, folder in reversed(_folders(output_dir)):
        if not _is_complete(folder):
            warnings.warn(f"{quote(folder)} is damaged and is skipped", stacklevel=2)
            continue
        state: dict[str, Any] = read_json(folder / _STATE)
        return RunState(
            step=state["step"],
            config=state["config"],
            weights=_load(folder / "weights.safetensors"),
            ema=_load(folder / "ema.safetensors"),
            optimizer=_load(folder / "optimizer.safetensors"),
            scaler=state.get("scaler", {}),
            processes=state.get("processes"),
            unfinished_row=state.get("window", {}),
            data_digest=state.get("data_digest"),
        )
    remedy = "delete them" if has_checkpoint(output_dir) else "start without resume"
    raise ResumeError(f"nothing to resume in {quote(output_dir)}: it holds no complete checkpoint; {remedy}")


def has_checkpoint(output_dir: Path) -> bool:
    """Whether a run has saved a checkpoint here, even if it is damaged now."""
    return bool(_folders(output_dir))


def _load(file: Path) -> dict[str, Tensor]:
    return load_file(file) if file.is_file() else {}


def delete_old_checkpoints(output_dir: Path, newest: int, keep: int) -> None:
    """Of the checkpoints with a manifest up to step `newest`, keep the last `keep`; delete all others.

    Later ones are damaged: they were skipped when the run was resumed.
    """
    folders = _folders(output_dir)
    finished = [folder for step, folder in folders if step <= newest and (folder / MANIFEST).is_file()]
    for _, folder in folders:
        if folder not in finished[-keep:]:
            remove_folder(folder)


def _folders(output_dir: Path) -> list[tuple[int, Path]]:
    """All checkpoints, damaged ones included, in the order of their steps."""
    if not output_dir.is_dir():
        return []
    names = ((_NAME.fullmatch(folder.name), folder) for folder in output_dir.iterdir())
    return sorted((int(match[1]), folder) for match, folder in names if match)


def _is_complete(folder: Path) -> bool:
    try:
        sums = read_json(folder / MANIFEST)
    except CheckpointError:
        return False
    files = [(folder / name, digest) for name, digest in sums.items()]
    return _STATE in sums and all(file.is_file() and _sha256(file) == digest for file, digest in files)


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
