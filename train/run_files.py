"""What a run writes into its folder besides its checkpoints: rows of a log, and folders that replace older ones."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from latentgen.errors import OutputError
from latentgen.files import atomic_folder, atomic_write, quote, sync_folder

LOG = "log.jsonl"
# The names that latentgen.files gives to what is not finished.
_TEMPORARY = re.compile(r"\.[0-9a-f]{16}\.tmp")


def append_row(output_dir: Path, row: Mapping[str, object]) -> None:
    """Add a row to the log.

    Raises:
        OutputError: it could not be written; a part of it may have been, which `trim_log` drops.
    """
    log = output_dir / LOG
    try:
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    except OSError as error:
        raise _cannot_write(log, error) from error


def sync_log(output_dir: Path) -> None:
    """Wait until the rows are on the disk: a checkpoint must not outlast, in a power cut, the rows before it.

    Raises:
        OutputError: they could not be written.
    """
    log = output_dir / LOG
    try:
        with log.open("rb") as file:
            os.fsync(file.fileno())
    except FileNotFoundError:
        return  # nothing is logged as often as it is saved
    except OSError as error:
        raise _cannot_write(log, error) from error


def trim_log(output_dir: Path, step: int) -> None:
    """Drop the rows of steps after `step`: they will be run again.

    Raises:
        OutputError: the log could not be written; it is as it was.
    """
    log = output_dir / LOG
    if not log.is_file():
        return
    rows = log.read_text("utf-8", errors="replace").splitlines(keepends=True)
    with atomic_write(log) as file:
        file.writelines(row.encode() for row in rows if _step_of(row) <= step)


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """A new folder that takes the place of `folder`, and of all that was in it, only when the block ends well.

    Raises:
        OutputError: it cannot be written; what stood there is intact.
    """
    finished = folder.with_name(f".{secrets.token_hex(8)}.tmp")
    with atomic_folder(finished) as written:
        yield written
        sync_folder(written)
    try:
        if folder.exists():
            discard(folder)
        finished.replace(folder)
        sync_folder(folder.parent)
    except OSError as error:
        raise _cannot_write(folder, error) from error


def discard(folder: Path) -> None:
    """Delete a folder, which is gone as a whole at once; one that cannot be deleted is told of and costs no more.

    Raises:
        OutputError: it cannot even be renamed.
    """
    unnamed = folder.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        folder.rename(unnamed)
    except OSError as error:
        raise _cannot_write(folder, error) from error
    _delete(unnamed)


def delete_unfinished(output_dir: Path) -> None:
    """Delete what a process that was killed had begun to write, or to delete, beside the run's files."""
    for path in list(output_dir.iterdir()):
        if _TEMPORARY.fullmatch(path.name):
            _delete(path)


def _delete(path: Path) -> None:
    try:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError as error:
        warnings.warn(f"{quote(path)} cannot be deleted: {error.strerror or error}", stacklevel=3)


def _cannot_write(path: Path, error: OSError) -> OutputError:
    return OutputError(
        f"cannot write {quote(path)}: {error.strerror or error}; the last checkpoint is intact: free some space or "
        "choose a folder that can be written"
    )


def _step_of(row: str) -> float:
    try:
        return json.loads(row)["step"]
    except (ValueError, TypeError, KeyError):
        return float("inf")  # cut off while it was written
