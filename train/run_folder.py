"""The folder of a run: one writer at a time, and never two different runs in it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import ValidationError

from latentgen.errors import OutputError, ResumeError, RunLockedError
from latentgen.files import atomic_write, quote
from latentgen.train.checkpoint import RunState, has_checkpoint, load_latest
from latentgen.train.config import FREE_FIELDS, TrainConfig, in_one_line

LOG = "log.jsonl"
_LOCK = ".lock"


@contextmanager
def run_lock(output_dir: Path, *, enabled: bool) -> Iterator[None]:
    """Make and hold the run folder: a lock of the operating system, which ends with the process however it ends.

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
        output_dir.mkdir(parents=True, exist_ok=True)
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
        yield
    finally:
        lock.release()


def starting_state(config: TrainConfig) -> RunState | None:
    """The latest checkpoint if the recipe says resume, None for a new run in a folder without one.

    Raises:
        ResumeError: a run is there and resume is off; none is there and resume is on; or the recipe has changed.
    """
    if not config.resume:
        if has_checkpoint(config.output_dir):
            raise ResumeError(
                f"{quote(config.output_dir)} holds a run already: add --set resume=true, or choose another output_dir"
            )
        return None
    state = load_latest(config.output_dir)
    try:
        before = _flatten(
            TrainConfig.model_validate(state.config)
        )  # fields that came later take their defaults
    except ValidationError as error:
        raise ResumeError(
            f"the run in {quote(config.output_dir)} was begun by a version with other recipes: {in_one_line(error)}"
        ) from None
    now = _flatten(config)
    changed = [
        f"{field} was {before.get(field)}, is {now.get(field)}"
        for field in sorted(before.keys() | now.keys())
        if field.partition(".")[0] not in FREE_FIELDS and before.get(field) != now.get(field)
    ]
    if changed:
        raise ResumeError(f"the recipe is not the one that the run began with: {'; '.join(changed)}")
    return state


def trim_log(output_dir: Path, step: int) -> None:
    """Drop the rows of steps after `step`: they will be run again."""
    log = output_dir / LOG
    if not log.is_file():
        return
    rows = log.read_text("utf-8").splitlines(keepends=True)
    with atomic_write(log) as file:
        file.writelines(row.encode() for row in rows if _step_of(row) <= step)


def _step_of(row: str) -> float:
    try:
        return json.loads(row)["step"]
    except (ValueError, TypeError, KeyError):
        return float("inf")  # cut off while it was written


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
