"""The folder of a run: one writer at a time, and never two different runs in it."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import ValidationError

from latentgen.errors import OutputError, ResumeError, RunLockedError
from latentgen.files import quote, sync_folder
from latentgen.train.checkpoint import RunState, has_checkpoint, load_latest
from latentgen.train.config import FIXED_FIELDS, FREE_FIELDS, SWITCHING_FIELDS, TrainConfig, in_one_line
from latentgen.train.run_files import delete_unfinished

_LOCK = ".lock"


@contextmanager
def run_lock(output_dir: Path, *, enabled: bool) -> Iterator[None]:
    """Make and hold the run folder: a lock of the operating system, which ends with the process however it ends.

    What a process that was killed has left unfinished is deleted.

    Args:
        output_dir: the folder.
        enabled: false in all but one of the processes of a run.

    Raises:
        RunLockedError: another process holds it.
        OutputError: it cannot be made or written.
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
        raise OutputError(
            f"output_dir {quote(output_dir)} cannot be written: {error.strerror or error}"
        ) from error
    try:
        delete_unfinished(output_dir)
        yield
    finally:
        lock.release()


def starting_state(config: TrainConfig, *, processes: int = 1, quiet: bool = False) -> RunState | None:
    """The latest checkpoint if the recipe says resume, None for a new run in a folder without one.

    Args:
        config: the recipe.
        processes: how many there are; another number than before is warned of, as are the changes that are allowed.
        quiet: whether to leave these warnings to another process.

    Raises:
        ResumeError: a run is there and resume is off; none is there and resume is on; the recipe has changed; or the
            run has done more steps than it asks for.
    """
    folder = config.output_dir
    if config.resume != "latest" and not has_checkpoint(folder):
        return None
    if config.resume == "no":
        raise ResumeError(
            f"{quote(folder)} holds a run already: add --set resume=latest, or choose another output_dir"
        )
    state = load_latest(folder)
    changed = _changes(state, config)
    if state.step > config.max_steps:
        raise ResumeError(
            f"the run in {quote(folder)} has done {state.step} steps, and max_steps is {config.max_steps}: set it to "
            "more, or choose another output_dir"
        )
    notes = [f"from step {state.step} on the recipe is another: {'; '.join(changed)}"] if changed else []
    if state.step == config.max_steps:
        notes.append(
            f"all {state.step} steps of the run are done, and its model is written once more; to go on, raise max_steps"
        )
    if state.processes not in (None, processes):
        notes.append(
            f"the run was computed by {state.processes} processes and goes on with {processes}: it sees the same "
            "samples in the same order, but its sums are rounded in another order"
        )
    if not quiet:
        for note in notes:
            warnings.warn(note, stacklevel=2)
    return state


def check_same_data(state: RunState, digest: str, config: TrainConfig, *, quiet: bool = False) -> None:
    """Refuse to go on with another training set, or warn of it if `allow_changes` names `data`, or fields of it.

    Args:
        state: what the run goes on from; of old checkpoints the training set is not known.
        digest: of the training set as it is now.
        config: the recipe.
        quiet: whether to leave the warning to another process.

    Raises:
        ResumeError: it was changed.
    """
    if state.data_digest in (None, digest):
        return
    changed = "the images or captions of data are not those that the run began with"
    if not any(name.partition(".")[0] == "data" for name in config.allow_changes):
        allowed = ", ".join([*config.allow_changes, "data"])
        raise ResumeError(
            f"{changed}: put them back, or to go on with them as they are add --set 'allow_changes=[{allowed}]'"
        )
    if not quiet:
        warnings.warn(f"from step {state.step} on {changed}", stacklevel=2)


def _changes(state: RunState, config: TrainConfig) -> list[str]:
    """Where a recipe differs from that of a checkpoint, as far as `allow_changes` lets it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # fields may be stored under old names
            recipe = TrainConfig.model_validate(state.config)  # newer fields take their defaults
    except ValidationError as error:
        raise ResumeError(
            f"the run in {quote(config.output_dir)} was begun by a version with other recipes: {in_one_line(error)}"
        ) from None
    before, now = _flatten(recipe), _flatten(config)
    changed = {
        field: f"{field} was {before.get(field)}, is {now.get(field)}"
        for field in sorted(before.keys() | now.keys())
        if not _is_named(field, FREE_FIELDS) and before.get(field) != now.get(field)
    }
    fixed = [
        field
        for field in changed
        if field in FIXED_FIELDS
        or (field in SWITCHING_FIELDS and bool(before.get(field)) is not bool(now.get(field)))
    ]
    refused = [field for field in changed if field in fixed or not _is_named(field, config.allow_changes)]
    if refused:
        remedy = (
            f"{', '.join(fixed)} cannot change within a run: begin a new one in another output_dir"
            if fixed
            else f"to change it all the same add --set 'allow_changes=[{', '.join(refused)}]'"
        )
        differences = "; ".join(changed[field] for field in refused)
        raise ResumeError(f"the recipe is not the one that the run began with: {differences}; {remedy}")
    return list(changed.values())


def _is_named(field: str, names: Collection[str]) -> bool:
    """Whether a field, or a section that it is in, is one of `names`."""
    return any(field == name or field.startswith(f"{name}.") for name in names)


def _flatten(config: TrainConfig) -> dict[str, Any]:
    """The fields of a recipe as JSON has them, nested ones with dots in their names."""
    flat: dict[str, Any] = {}
    sections: list[tuple[str, Mapping[str, Any]]] = [("", config.model_dump(mode="json"))]
    while sections:
        prefix, fields = sections.pop()
        for name, value in fields.items():
            if isinstance(value, Mapping):
                sections.append((f"{prefix}{name}.", value))
            else:
                flat[prefix + name] = value
    return flat
