"""The folder of a run: one writer at a time, and only runs that may continue from its latest checkpoint."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import ValidationError

from latentgen.errors import OutputError, ResumeError, RunLockedError
from latentgen.files import delete_temporary, quote, sync_folder
from latentgen.train.checkpoint import RunState, has_checkpoint, load_latest
from latentgen.train.config import TrainConfig, in_one_line

_LOCK = ".lock"
# Fields in which a resumed run may differ. Of these only max_steps changes what is computed: it moves the end of the
# learning rate's schedule.
_FREE_FIELDS = frozenset(
    {
        *("output_dir", "max_steps", "checkpoint_every", "keep_checkpoints", "log_every", "workers"),
        *("resume", "allow_changes", "validation", "trackers", "task.cache_dir", "data.index_dir"),
        *("memory.gradient_checkpointing", "memory.ema_device", "memory.offload_optimizer"),
        "memory.planner",
    }
)
# Fields in which it may not differ even if allow_changes names them: the checkpoint would not fit the run.
_FIXED_FIELDS = frozenset(
    {
        *("task.kind", "task.method.kind", "task.method.rank", "task.method.targets"),
        *("task.method.text_targets", "task.method.train_text_encoder", "task.method.num_vectors"),
        *("task.convert_to", "task.train_encoder", "task.train_text_encoder", "optimizer.name"),
    }
)


@contextmanager
def run_lock(output_dir: Path, *, enabled: bool) -> Iterator[None]:
    """Create the run folder, hold its lock, and delete the temporary files of a killed process.

    The operating system releases the lock when the process ends, in whatever way. Only one of the processes of a run is
    `enabled`.

    Raises:
        RunLockedError: another process holds the lock.
        OutputError: the folder cannot be created or written.
    """
    if not enabled:
        yield
        return
    lock = FileLock(output_dir / _LOCK, timeout=0)
    try:
        if not output_dir.is_dir():
            output_dir.mkdir(parents=True, exist_ok=True)
            sync_folder(output_dir.parent)
        lock.acquire()
    except Timeout:
        raise RunLockedError(
            f"another process trains in {quote(output_dir)}; wait for it, or choose another output_dir"
        ) from None
    except OSError as error:
        raise OutputError(f"output_dir cannot be written: {error}") from error
    try:
        delete_temporary(output_dir)
        yield
    finally:
        lock.release()


def state_to_resume(config: TrainConfig, *, processes: int = 1, quiet: bool = False) -> RunState | None:
    """The latest checkpoint of a run that the recipe resumes; None for a new run.

    Args:
        config: the recipe.
        processes: how many train together; a warning says if it was another number before, or if the recipe has
            changed in a way that `allow_changes` permits.
        quiet: whether to omit the warnings.

    Raises:
        ResumeError: there is a run and `resume` is no; there is none and `resume` is latest; the recipe has changed;
            or more steps are done than `max_steps`.
    """
    folder = config.output_dir
    if config.resume != "latest" and not has_checkpoint(folder):
        return None
    if config.resume == "no":
        raise ResumeError(f"{quote(folder)} already holds a run: add --set resume=latest")
    state = load_latest(folder)
    changes = _allowed_changes(state, config)
    if state.step > config.max_steps:
        raise ResumeError(
            f"{quote(folder)} has {state.step} steps, more than max_steps, {config.max_steps}; raise it"
        )
    notes = [f"the recipe changes at step {state.step}: {'; '.join(changes)}"] if changes else []
    if state.step == config.max_steps:
        notes.append(
            f"all {state.step} steps of the run are done, so only its model is written again; to continue training, "
            "raise max_steps"
        )
    if state.processes not in (None, processes):
        notes.append(
            f"the run used {state.processes} processes and continues with {processes}: it sees the same samples in the "
            "same order, but sums are rounded differently"
        )
    if not quiet:
        for note in notes:
            warnings.warn(note, stacklevel=2)
    return state


def check_same_data(state: RunState, digest: str, config: TrainConfig, *, quiet: bool = False) -> None:
    """Refuse to resume with training data of another `digest`; `quiet` omits warnings.

    It only warns if `allow_changes` names `data` or one of its fields. Old checkpoints, without a digest, are accepted.

    Raises:
        ResumeError: the data has changed.
    """
    if state.data_digest in (None, digest):
        return
    changed = "the images or captions of data have changed since the run began"
    if not any(name.partition(".")[0] == "data" for name in config.allow_changes):
        allowed = ", ".join([*config.allow_changes, "data"])
        raise ResumeError(
            f"{changed}: restore them, or to continue with the new ones add --set 'allow_changes=[{allowed}]'"
        )
    if not quiet:
        warnings.warn(f"{changed}; step {state.step} is the last one with the old ones", stacklevel=2)


def _allowed_changes(state: RunState, config: TrainConfig) -> list[str]:
    """How a recipe differs from that of a checkpoint; a difference that is not allowed is a ResumeError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # fields may be stored under old names
            saved = TrainConfig.model_validate(state.config)  # newer fields take their defaults
    except ValidationError as error:
        raise ResumeError(
            f"the run in {quote(config.output_dir)} began with a recipe of another version: {in_one_line(error)}"
        ) from None
    before, now = (_flatten(recipe.model_dump(mode="json")) for recipe in (saved, config))
    changes = {
        field: f"{field} was {before.get(field)}, is {now.get(field)}"
        for field in sorted(before.keys() | now.keys())
        if not _is_named(field, _FREE_FIELDS) and before.get(field) != now.get(field)
    }
    fixed = [field for field in changes if field in _FIXED_FIELDS]
    if "ema_decay" in changes and 0 in (before["ema_decay"], now["ema_decay"]):
        fixed.append("ema_decay")  # there is an average on one side only
    refused = [field for field in changes if field in fixed or not _is_named(field, config.allow_changes)]
    if refused:
        remedy = (
            f"{', '.join(fixed)} cannot change within a run: start a new one in another output_dir"
            if fixed
            else f"to change it anyway add --set 'allow_changes=[{', '.join(refused)}]'"
        )
        differences = "; ".join(changes[field] for field in refused)
        raise ResumeError(f"the recipe has changed since the run began: {differences}; {remedy}")
    return list(changes.values())


def _is_named(field: str, names: Collection[str]) -> bool:
    """Whether a field, or a section that contains it, is one of `names`."""
    return any(field == name or field.startswith(f"{name}.") for name in names)


def _flatten(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The fields of a recipe as JSON, nested ones under dotted names."""
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        nested = isinstance(value, Mapping)
        flat |= _flatten(value, f"{prefix}{name}.") if nested else {prefix + name: value}
    return flat
