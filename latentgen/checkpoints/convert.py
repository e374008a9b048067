"""Converts checkpoints: pickles to safetensors in a child process with limits, other layouts, other precisions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, get_args

import torch
from tqdm import tqdm

from latentgen.checkpoints.folder import CheckpointFolder, as_path
from latentgen.checkpoints.identify import DeclaredPrediction
from latentgen.checkpoints.io import is_pickle, open_checkpoint, read_header
from latentgen.checkpoints.rewrite import (
    Written,
    component_files,
    convert_file,
    convert_folder,
    write_folder,
    write_single_file,
)
from latentgen.checkpoints.single_file import SingleFile
from latentgen.checkpoints.weights import variant_infix
from latentgen.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointNotFoundError,
    CheckpointValueError,
    InputError,
    OutputError,
    UnsafeCheckpointError,
)
from latentgen.files import atomic_write, quote, wrong_content

DTypeName = Literal["float32", "float16", "bfloat16"]
# CPU time of the child: for importing torch, and for reading the file. The wall clock runs faster on a busy machine.
START_SECONDS = 120
BYTES_PER_SECOND = 5_000_000
WALL_CLOCK = 5
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# The child has this process's sys.path, and only those environment variables that it needs to find libraries.
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv.pop(1)); "
    "from latentgen.checkpoints.unpickle import main; main()"
)
_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT")
_CHILD_ERRORS = {
    kind.__name__: kind
    for kind in (UnsafeCheckpointError, CheckpointCorruptError, CheckpointValueError, OutputError)
}
_MAX_REPORT_BYTES = 2**20


@dataclass(frozen=True)
class Conversion:
    """The file or folder written, its number of tensors, and the parts of the source that were left out."""

    path: Path
    tensors: int
    left_out: tuple[str, ...]


def convert(
    source: str | Path,
    target: str | Path | None = None,
    *,
    dtype: DTypeName | None = None,
    variant: str | None = None,
    prediction_type: DeclaredPrediction | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> Conversion:
    """Convert a checkpoint; the kind of ``source`` and ``target`` decides how.

    - A pickle (.ckpt, .pt, .pth, .bin) becomes a safetensors file. A child process with torch's restricted unpickler
      reads it, under limits of memory, time and open files. It takes tensors by name, also inside ``state_dict``;
      numbers, texts and the state of training are left out, as are tensors without elements. A textual-inversion
      embedding becomes one tensor with the name of its token.
    - A single file becomes a folder in the diffusers layout, and a folder a single file in the original layout.
    - A safetensors file, or a folder, becomes the same in another precision: integers, metadata and shards stay as
      they are, and configurations and tokenizers are copied byte for byte.

    Args:
        target: a folder, or a path that ends in .safetensors; None, for pickles only, is :func:`pickle_target`.
        dtype: what floating-point tensors become; None keeps each one's own.
        variant: for folders, becomes part of the names of the weights ("fp16": ``model.fp16.safetensors``).
        prediction_type: of a single file of SD 2.x whose metadata does not declare it.
        overwrite: replace a target file that exists; folders are never replaced.
        progress: show a progress bar.

    Raises:
        InputError: an invalid argument, or a conversion that is not supported.
        UnsafeCheckpointError: a pickle references code that weights do not need; nothing was run.
        CheckpointCorruptError: the source is damaged, holds no weights, or takes too much time or memory.
        CheckpointValueError: a weight is NaN or infinite, or too large for ``dtype``.
        CheckpointError, ConfigError: another problem of the source, in a subclass.
        OutputError: the target exists or cannot be written; existing files are never damaged.
    """
    source = as_path(source)
    if not source.exists():
        raise CheckpointNotFoundError(f"{quote(source)} does not exist; give a checkpoint's file or folder")
    pickled = source.is_file() and is_pickle(source)
    target = pickle_target(source) if target is None and pickled else target
    if target is None or not (pickled or dtype is not None or _changes_layout(source, as_path(target))):
        raise InputError(
            f"{quote(source)} is not a pickle: give a target and a dtype (--dtype float16) to change its precision, "
            "a folder as the target of a file, or a .safetensors file as the target of a folder"
        )
    target = as_path(target)
    if dtype is not None and not (isinstance(dtype, str) and dtype in _DTYPES):
        raise InputError(f"dtype is {quote(dtype)}; allowed are {', '.join(get_args(DTypeName))}")
    variant_infix(variant)
    writes_file = pickled or target.suffix == ".safetensors"
    if variant is not None and writes_file:
        raise InputError(f"variant {quote(variant)} is for folders; {quote(target)} is a file")
    if writes_file:
        _check_target(source, target, overwrite)
    elif source.is_dir():
        _check_separate(source, target)
    if pickled:
        return _convert_pickle(source, target, dtype, progress)
    torch_dtype = None if dtype is None else _DTYPES[dtype]
    if source.is_dir():
        folder = CheckpointFolder.open(source)
        with _bar(_bytes_of(folder), progress) as bar:
            if writes_file:
                written = write_single_file(folder, target, torch_dtype, bar.update)
            else:
                written = convert_folder(folder, target, torch_dtype, variant, bar.update)
    else:
        with _bar(source.stat().st_size, progress) as bar:
            if writes_file:
                written = Written(len(convert_file(source, target, torch_dtype, bar.update)), ())
            else:
                file = SingleFile.open(source, prediction_type=prediction_type)
                written = write_folder(file, target, torch_dtype, variant, bar.update)
    return Conversion(target, written.tensors, written.left_out)


def _convert_pickle(source: Path, target: Path, dtype: str | None, progress: bool) -> Conversion:
    _check_pickle(source)
    size = source.stat().st_size
    seconds = START_SECONDS + size // BYTES_PER_SECOND
    path = json.dumps([os.path.abspath(entry) for entry in sys.path])
    command = [sys.executable, "-I", "-c", _START, path, str(source), dtype or "", str(seconds)]
    with atomic_write(target) as file, tempfile.TemporaryFile() as errors:
        with _bar(size, progress) as bar:
            code = _run(command, file, errors, WALL_CLOCK * seconds, bar)
        left_out = _read_report(source, code, errors)
        try:
            header = read_header(file.name)
        except CheckpointError as error:
            raise CheckpointCorruptError(f"{quote(source)} converts to an invalid file: {error}") from error
    return Conversion(target, len(header), left_out)


def _bytes_of(folder: CheckpointFolder) -> int:
    files = (file for component in folder.components for file in component_files(folder, component))
    return sum(info.nbytes for file in files for info in read_header(file).values())


def pickle_target(source: Path) -> Path:
    """The default target for a pickle: next to it, under its name in the diffusers layout."""
    if source.suffix == ".safetensors":
        return source.with_stem(f"{source.stem}-converted")
    stem = source.stem.removeprefix("pytorch_") if source.stem.startswith("pytorch_model") else source.stem
    return source.with_name(f"{stem}.safetensors")


def _changes_layout(source: Path, target: Path) -> bool:
    """Whether the target is a single file and the source a folder, or the reverse."""
    return source.is_dir() == (target.suffix == ".safetensors")


def _check_pickle(source: Path) -> None:
    if not source.is_file():
        raise CheckpointNotFoundError(f"{quote(source)} does not exist or is not a file")
    with open_checkpoint(source) as file:
        head = file.read(1024)
    if problem := wrong_content(head):
        raise CheckpointCorruptError(f"{quote(source)} is {problem}, not a checkpoint; download it again")
    if head[8:9] == b"{":
        raise InputError(
            f"{quote(source)} is a safetensors file with the name of a pickle: rename it to "
            f"{quote(source.stem + '.safetensors')}"
        )


def _check_target(source: Path, target: Path, overwrite: bool) -> None:
    """Refuse a target file that is the source, exists, or has another suffix."""
    if target.suffix != ".safetensors":
        raise InputError(f"target {quote(target)} has to end in .safetensors")
    if target.exists():
        if target.samefile(source):
            raise InputError(f"{quote(target)} is the source itself; give another target")
        if not overwrite:
            raise OutputError(f"{quote(target)} exists; give another target, or overwrite it (--force)")


def _check_separate(source: Path, target: Path) -> None:
    old, new = source.resolve(), target.resolve()
    if new.is_relative_to(old) or old.is_relative_to(new):
        raise InputError(
            f"target {quote(target)} and source {quote(source)} contain each other; give another target"
        )


def _bar(total: int, progress: bool) -> tqdm:
    """A progress bar, shown after two seconds."""
    return tqdm(
        total=total, desc="converting", unit="B", unit_scale=True, delay=2, leave=False, disable=not progress
    )


def _run(command: Sequence[str], output: BinaryIO, errors: BinaryIO, seconds: float, bar: tqdm) -> int:
    """Run the child until it ends or its time is over; returns its exit code."""
    environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    deadline = time.monotonic() + seconds
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, env=environment
    ) as child:
        try:
            while True:
                try:
                    return child.wait(timeout=0.1)
                except subprocess.TimeoutExpired:
                    bar.update(os.fstat(output.fileno()).st_size - bar.n)
                if time.monotonic() > deadline:
                    raise CheckpointCorruptError(
                        f"reading {quote(command[5])} took longer than {seconds:,} s and was stopped; the "
                        "file is damaged or hostile"
                    )
        finally:
            child.kill()


def _read_report(source: Path, code: int, errors: BinaryIO) -> tuple[str, ...]:
    """The names that the child left out, or its error, from its last line on stderr."""
    errors.seek(max(0, errors.seek(0, os.SEEK_END) - _MAX_REPORT_BYTES))
    lines = errors.read().decode("utf-8", "replace").splitlines()
    last = lines[-1] if lines else "no output"
    try:
        report = json.loads(last)
    except (ValueError, RecursionError):
        report = None
    match report:
        case {"dropped": list(dropped)} if code == 0:
            return tuple(map(str, dropped))
        case {"error": str(kind), "message": str(message)} if kind in _CHILD_ERRORS:
            raise _CHILD_ERRORS[kind](message)
    raise CheckpointCorruptError(
        f"{quote(source)} could not be read: the child process ended with code {code} ({quote(last)})"
    )
