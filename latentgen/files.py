"""Files of checkpoints and results: atomic writes, JSON objects, safe relative paths."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from reprlib import Repr
from typing import Any, BinaryIO

from latentgen.errors import (
    CheckpointCorruptError,
    CheckpointNotFoundError,
    LatentgenError,
    OutputError,
    UnsafePathError,
)

MAX_JSON_BYTES = 16 * 2**20
_TEMPORARY_NAME = re.compile(r"\.[0-9a-f]{16}\.tmp")
_MARKUP = re.compile(rb"\s*<(!doctype|html|head|body|\?xml)", re.IGNORECASE)
_MAX_PATH_BYTES = 255  # the longest name on common file systems
_REPR = Repr()
_REPR.maxstring = _REPR.maxother = 200
_DRIVE_LETTER = re.compile(r"[A-Za-z]:")


@contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file that appears at ``path`` only if the block succeeds; parent folders are created.

    The bytes go to a temporary file in the same folder, are flushed to the disk (fsync) and then renamed. If
    anything fails, an existing file at ``path`` is untouched and the temporary file is deleted.

    Raises:
        OutputError: the folder cannot be written, the disk is full, or ``path`` is a folder.
    """
    target = Path(path)
    with _temporary(target) as temporary:
        if target.is_dir():
            raise OutputError(f"cannot write {quote(target)}: it is a folder; pass the name of a file")
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
        sync_folder(target.parent)


@contextmanager
def atomic_folder(path: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """A new folder that appears at ``path`` only if the block succeeds; parent folders are created.

    The block fills a temporary folder next to ``path``, which is then renamed. If anything fails, the temporary
    folder is deleted and an existing folder at ``path`` is untouched.

    Args:
        path: the folder.
        replace: whether to delete an existing folder at ``path`` with its content.

    Raises:
        OutputError: ``path`` exists and is not an empty folder, or the folder cannot be written.
    """
    target = Path(path)
    with _temporary(target) as temporary:
        is_free = not target.exists() or (target.is_dir() and not any(target.iterdir()))
        if not (replace or is_free):
            raise OutputError(f"cannot write {quote(target)}: it exists; pass the name of a new folder")
        temporary.mkdir(parents=True)
        yield temporary
        sync_folder(temporary)
        if not is_free:
            remove_folder(target)
        elif target.is_dir():
            target.rmdir()  # empty; Windows does not rename over it
        temporary.replace(target)
        sync_folder(target.parent)


@contextmanager
def _temporary(target: Path) -> Iterator[Path]:
    """A free name next to ``target``; what is left there is deleted, and an OSError becomes an OutputError."""
    temporary = _temporary_name(target)
    try:
        yield temporary
    except LatentgenError:
        raise
    except OSError as error:
        raise OutputError(
            f"cannot write {quote(target)}: {error.strerror or error}; nothing was changed there: free some "
            "space or choose a folder that can be written"
        ) from error
    finally:
        if temporary != target:
            with suppress(OSError, ValueError):
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.unlink()


def remove_folder(folder: Path) -> None:
    """Delete a folder atomically: rename it (OutputError if that fails), then delete it (a warning if that fails)."""
    temporary = _temporary_name(folder)
    try:
        folder.rename(temporary)
    except OSError as error:
        raise OutputError(f"cannot delete {quote(folder)}: {error.strerror or error}") from error
    _delete(temporary)


def delete_temporary(folder: Path) -> None:
    """Delete the temporary files and folders of killed processes in ``folder``."""
    for path in list(folder.iterdir()):
        if _TEMPORARY_NAME.fullmatch(path.name):
            _delete(path)


def _temporary_name(target: Path) -> Path:
    return target.with_name(f".{secrets.token_hex(8)}.tmp") if target.name else target


def _delete(path: Path) -> None:
    try:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError as error:
        warnings.warn(f"{quote(path)} cannot be deleted: {error.strerror or error}", stacklevel=3)


def write_json(path: str | Path, data: Mapping[str, object]) -> None:
    """Write ``data`` as indented JSON through :func:`atomic_write`; NaN and infinity are a ValueError."""
    with atomic_write(path) as file:
        file.write(encode_json(data))


def encode_json(data: Mapping[str, object]) -> bytes:
    """Indented JSON in UTF-8; NaN and infinity are a ValueError."""
    return (json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")


def read_json(path: str | Path) -> dict[str, object]:
    """The JSON object in ``path``; NaN and Infinity are allowed, so check the bounds of a field where it is read.

    Raises:
        CheckpointNotFoundError: the file does not exist.
        CheckpointCorruptError: not UTF-8, not JSON, not an object, with duplicate keys, too deep, or large.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointNotFoundError(
            f"{quote(path)} does not exist or is not a file; the checkpoint is incomplete"
        )
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise CheckpointNotFoundError(f"{quote(path)} cannot be read: {error.strerror or error}") from error
    if len(data) > MAX_JSON_BYTES:
        raise CheckpointCorruptError(
            f"{quote(path)} is larger than {MAX_JSON_BYTES:,} bytes, the limit for JSON"
        )
    if problem := wrong_content(data):
        raise CheckpointCorruptError(
            f"{quote(path)} is {problem}, not a JSON object; download the file again"
        )
    return parse_json_object(data, str(path))


def parse_json_object(data: bytes, where: str) -> dict[str, object]:
    """Parse a JSON object without duplicate keys; CheckpointCorruptError, which names ``where``, for anything else."""
    try:
        value = json.loads(data.decode("utf-8-sig"), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise CheckpointCorruptError(
            f"{quote(where)} is not valid JSON ({reason}); download the file again"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointCorruptError(f"{quote(where)} is a JSON {type(value).__name__}; it must be an object")
    return value


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as a dict, for ``object_pairs_hook``; ValueError if it repeats a key."""
    if repeated := [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]:
        raise ValueError(f"it repeats the key {quote(repeated[0])}")
    return dict(pairs)


def safe_join(folder: Path, relative: object, field: str) -> Path:
    """``folder / relative``, where ``relative`` comes from a file and is not trusted.

    ``field`` names its place in errors. Symlinks may not leave the folder, except in the Hub's cache, whose
    snapshots link to the blobs of the same repository.

    Raises:
        UnsafePathError: not a plain relative path, or it leaves the folder.
    """
    problem = _path_problem(relative)
    if problem is None:
        root = folder.resolve()
        try:
            target = (root / str(relative)).resolve()
        except (OSError, RuntimeError) as error:
            problem = f"cannot be resolved ({error})"
        else:
            if not any(target.is_relative_to(allowed) for allowed in _allowed_roots(root)):
                problem = "leaves the folder through a symlink; copy the file into the folder instead"
    if problem:
        raise UnsafePathError(f"{field}: the path {quote(relative)} {problem}")
    return folder / str(relative)


def _path_problem(relative: object) -> str | None:
    if not isinstance(relative, str) or not relative:
        return "is not a file name"
    if "\0" in relative or "\\" in relative:
        return "has a NUL byte or a backslash; use a relative path with forward slashes"
    try:
        data = relative.encode("utf-8")
    except UnicodeEncodeError:
        return "is not valid Unicode"
    if len(data) > _MAX_PATH_BYTES:
        return f"is {len(data):,} bytes long; at most {_MAX_PATH_BYTES} are allowed"
    if relative.startswith("/") or _DRIVE_LETTER.match(relative):
        return "is absolute; it must be inside its folder"
    if ".." in relative.split("/"):
        return "leaves its folder; it must be inside"
    return None


def _allowed_roots(root: Path) -> list[Path]:
    """The folders that may hold files of a checkpoint at ``root``: itself, and the blobs of the Hub's cache."""
    roots = [root]
    for snapshot in (root, *root.parents):
        if snapshot.parent.name == "snapshots" and snapshot.parent.parent.name.startswith("models--"):
            roots.append(snapshot.parent.parent / "blobs")
    return roots


def wrong_content(head: bytes) -> str | None:
    """What a file is, by its first bytes, if it is a common mistake such as an HTML page; else None."""
    if not head:
        return "empty (0 bytes)"
    if not head.strip(b"\0"):
        return "filled with zero bytes"
    if head.startswith(b"version https://git-lfs"):
        size = re.search(rb"\nsize (\d{1,18})\b", head)
        expected = f" to a file of {int(size.group(1)):,} bytes" if size else ""
        return f"a git-LFS pointer{expected} (fetch the file itself with `git lfs pull`)"
    if _MARKUP.match(head):
        return "an HTML or XML page, probably an error page saved by a failed download"
    return None


def quote(value: object) -> str:
    """``value`` for an error message: control characters escaped, long text shortened."""
    return _REPR.repr(str(value) if isinstance(value, Path) else value)


def sync_folder(folder: Path) -> None:
    """Make a rename durable; not needed on Windows, which cannot open folders."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
