"""Converts pickles in a child process: torch's restricted unpickler under limits of memory, time and system calls."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple, NoReturn

import torch
from torch import Tensor

from latentgen.checkpoints.io import (
    DTYPE_NAMES,
    MAX_DIMENSIONS,
    MAX_HEADER_BYTES,
    MAX_TENSORS,
    TORCH_DTYPES,
    open_checkpoint,
    read_header,
    write_tensors,
)
from latentgen.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointValueError,
    InputError,
    LatentgenError,
    OutputError,
    UnsafeCheckpointError,
)
from latentgen.files import atomic_write, quote, wrong_content

# CPU time of the child: for importing torch, and for reading the file. A busy machine takes more wall-clock time.
START_SECONDS = 120
BYTES_PER_SECOND = 5_000_000
WALL_CLOCK = 5
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
# Views that share a storage are written separately: at most this many times the size of the file.
MAX_GROWTH = 4
_SPARE_BYTES = 512 * 2**20  # of address space, on top of the interpreter's and the file's
_OPEN_FILES = 64
_MAX_NAMES = 100  # of dropped entries, in the report
# Classes in published checkpoints that hold no weights, or hold them in `_parameters`.
_STAND_INS = (
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "torch.nn.modules.container.ParameterDict",
)
_REFUSED = re.compile(
    r"GLOBAL ([^\s`]+)|unrecognized function (.+?)(?: which belongs to|\n|$)|`add_safe_globals`,? but got (.+)"
)
# Prefixes of audit events; https://docs.python.org/3/library/audit_events.html
_FORBIDDEN = (
    *("socket.", "subprocess.", "shutil.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn"),
    *("os.startfile", "os.kill", "os.remove", "os.rename", "os.link", "os.symlink", "os.truncate", "pty."),
    *("os.chmod", "os.chown", "os.mkdir", "os.rmdir", "os.putenv", "urllib.", "webbrowser."),
)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def unpickle(
    source: Path, target: Path, dtype: torch.dtype | None, advance: Callable[[int], object]
) -> tuple[int, tuple[str, ...]]:
    """Write the tensors of a pickle to a safetensors file.

    A child process with torch's restricted unpickler reads it, under limits of memory, time and open files. It takes
    tensors by name, also inside ``state_dict``; numbers, texts and the state of training are left out, as are tensors
    without elements. A textual-inversion embedding becomes one tensor with the name of its token.

    Returns the number of tensors, and the names of the entries that were left out; ``advance`` is called with the
    number of bytes written since the last call. Errors as :func:`latentgen.checkpoints.convert.convert`.
    """
    with open_checkpoint(source) as file:
        head = file.read(1024)
    if problem := wrong_content(head):
        raise CheckpointCorruptError(f"{quote(source)} is {problem}, not a checkpoint; download it again")
    if head[8:9] == b"{":
        raise InputError(
            f"{quote(source)} is a safetensors file with the name of a pickle: rename it to "
            f"{quote(source.stem + '.safetensors')}"
        )
    with atomic_write(target) as file, tempfile.TemporaryFile() as errors:
        code = _run_child(source, dtype, file, errors, advance)
        left_out = _read_report(source, code, errors)
        try:
            return len(read_header(file.name)), left_out
        except CheckpointError as error:
            raise CheckpointCorruptError(f"{quote(source)} converts to an invalid file: {error}") from error


def _run_child(
    source: Path,
    dtype: torch.dtype | None,
    output: BinaryIO,
    errors: BinaryIO,
    advance: Callable[[int], object],
) -> int:
    """Run the child until it ends or its time is over; returns its exit code."""
    seconds = START_SECONDS + source.stat().st_size // BYTES_PER_SECOND
    path = json.dumps([os.path.abspath(entry) for entry in sys.path])
    name = DTYPE_NAMES[dtype] if dtype else ""
    command = [sys.executable, "-I", "-c", _START, path, str(source), name, str(seconds)]
    environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    deadline, written = time.monotonic() + WALL_CLOCK * seconds, 0
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, env=environment
    ) as child:
        try:
            while time.monotonic() < deadline:
                with suppress(subprocess.TimeoutExpired):
                    return child.wait(timeout=0.1)
                size = os.fstat(output.fileno()).st_size
                advance(size - written)
                written = size
        finally:
            child.kill()
    raise CheckpointCorruptError(
        f"reading {quote(source)} took longer than {WALL_CLOCK * seconds:,} s and was stopped; the file is damaged or "
        "hostile"
    )


def _read_report(source: Path, code: int, errors: BinaryIO) -> tuple[str, ...]:
    """The names that the child left out, or its error, from its last line on stderr."""
    errors.seek(max(0, errors.seek(0, os.SEEK_END) - _MAX_REPORT_BYTES))
    lines = errors.read().decode("utf-8", "replace").splitlines()
    last = lines[-1] if lines else "no output"
    report = None
    with suppress(ValueError, RecursionError):
        report = json.loads(last)
    match report:
        case {"dropped": list(dropped)} if code == 0:
            return tuple(map(str, dropped))
        case {"error": str(kind), "message": str(message)} if kind in _CHILD_ERRORS:
            raise _CHILD_ERRORS[kind](message)
    raise CheckpointCorruptError(
        f"{quote(source)} could not be read: the child process ended with code {code} ({quote(last)})"
    )


class State(NamedTuple):
    """The weights in a pickle, and the names of its other entries."""

    tensors: dict[str, Tensor]
    dropped: list[str]


class _StandIn:
    """Replaces an object whose class is never imported; stores its state."""

    def __init__(self, *arguments: object) -> None:
        self.state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state


def main() -> NoReturn:
    """The child: lower the limits of its process, and write the tensors of a pickle to stdout.

    Its arguments are the pickle, the name of the dtype (empty keeps each tensor's own) and the seconds of CPU time. The
    last line on stderr is a JSON object with ``dropped`` or ``error``.
    """
    source, dtype, seconds = Path(sys.argv[1]), TORCH_DTYPES.get(sys.argv[2]), int(sys.argv[3])
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # keeps other output out of the file
    report: dict[str, object]
    try:
        torch.set_num_threads(1)
        _limit(source.stat().st_size, seconds)
        sys.addaudithook(_refuse)
        state = read_pickle(source)
        write_tensors(output, state.tensors, {"format": "pt"}, dtype=dtype, checked_source=source)
        output.flush()
        more = [f"and {len(state.dropped) - _MAX_NAMES:,} more"] if len(state.dropped) > _MAX_NAMES else []
        report = {"dropped": state.dropped[:_MAX_NAMES] + more}
    except LatentgenError as error:
        report = {"error": type(error).__name__, "message": str(error)}
    except OSError as error:
        message = f"the weights of {quote(source)} cannot be written: {error.strerror or error}"
        report = {"error": "OutputError", "message": message}
    print(f"\n{json.dumps(report)}", file=sys.stderr, flush=True)
    os._exit(0)  # destroying the objects of a hostile file could take forever


def read_pickle(source: Path) -> State:
    """The weights in a file that `torch.save` wrote, memory-mapped where its format allows.

    Raises:
        UnsafeCheckpointError: the file references more than tensors and plain values.
        CheckpointCorruptError: the file is damaged, or is not a state dict of dense tensors.
    """
    try:
        with open(source, "rb") as file:
            archive = file.read(4) == b"PK\x03\x04"
        records = _records(source) if archive else None
        state = _extract(_load(source, archive), source.stem)
        _check_sizes(state, source.stat().st_size, records)
    except ValueError as error:
        raise CheckpointCorruptError(f"{quote(source)} cannot be converted: {error}") from error
    return state


def _check_sizes(state: State, size: int, records: set[int] | None) -> None:
    """Refuse tensors that claim more than a file of ``size`` bytes with these records holds."""
    if not state.tensors or len(state.tensors) > MAX_TENSORS:
        raise ValueError(f"it holds {len(state.tensors):,} tensors; allowed are 1 to {MAX_TENSORS:,}")
    storages = (tensor.untyped_storage() for tensor in state.tensors.values())
    distinct = {storage.data_ptr(): storage.nbytes() for storage in storages}
    claimed = sum(distinct.values())
    if claimed > size or (records is not None and not records.issuperset(distinct.values())):
        raise ValueError(f"it declares tensors of {claimed:,} bytes and has only {size:,} bytes")
    if (total := sum(tensor.nbytes for tensor in state.tensors.values())) > MAX_GROWTH * size:
        raise ValueError(
            f"its {size:,} bytes would become {total:,}, because its tensors overlap; at most {MAX_GROWTH} times the "
            "size is allowed"
        )


def _limit(size: int, seconds: int) -> None:
    """Limit the resources of the process, given the size of its input."""
    try:
        import resource
    except ImportError:  # Windows: the parent's timeout is the only limit
        return
    limits = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_NOFILE: _OPEN_FILES,
        resource.RLIMIT_FSIZE: MAX_GROWTH * size + MAX_HEADER_BYTES,
    }
    with suppress(OSError):  # Linux only
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        # The mapped file, one tensor made contiguous and one in another precision.
        limits[resource.RLIMIT_AS] = pages * resource.getpagesize() + 3 * size + _SPARE_BYTES
    for kind, limit in limits.items():
        hard = resource.getrlimit(kind)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (limit, limit))


def _refuse(event: str, arguments: tuple[object, ...]) -> None:
    """An audit hook, in case a pickle escapes torch's restricted unpickler."""
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITING
    if writes or event.startswith(_FORBIDDEN):
        raise UnsafeCheckpointError(
            f"reading the file triggered {event}, which weights never need; it was stopped"
        )


def _records(source: Path) -> set[int]:
    """The sizes of the records in a zip archive, which `torch.save` stores without compression."""
    try:
        with zipfile.ZipFile(source) as archive:
            records = archive.infolist()
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError) as error:
        raise ValueError(f"it is truncated or damaged ({error}); download it again") from error
    for record in records:
        if record.compress_type != zipfile.ZIP_STORED or record.compress_size != record.file_size:
            raise ValueError(
                f"the record {quote(record.filename)} is compressed; torch.save never compresses"
            )
    return {0, *(record.file_size for record in records)}


def _load(source: Path, archive: bool) -> object:
    stand_ins: list[Callable[..., object] | tuple[Callable[..., object], str]]
    stand_ins = [(_StandIn, name) for name in _STAND_INS]
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(stand_ins):
            warnings.simplefilter("ignore")
            if source.suffix == ".safetensors":  # torch goes by the name
                with open(source, "rb") as file:
                    return torch.load(file, map_location="cpu", weights_only=True)
            return torch.load(source, map_location="cpu", weights_only=True, mmap=archive)
    except LatentgenError:
        raise
    except Exception as error:  # a damaged file can raise anything inside torch
        message = str(error).partition("WeightsUnpickler error:")[2] or str(error)
        if isinstance(error, pickle.UnpicklingError) and (match := _REFUSED.search(message)):
            name = next(group for group in match.groups() if group)
            raise UnsafeCheckpointError(
                f"{quote(source)} references {quote(name.strip())}, which weights do not need and which may run code; "
                "nothing was run: ask the author of the file for a .safetensors file"
            ) from error
        reason = message.partition("Check the documentation")[0].strip() or type(error).__name__
        raise ValueError(
            f"torch cannot read it: {quote(' '.join(reason.split()))}; download it again"
        ) from error


def _extract(loaded: object, stem: str) -> State:
    """The tensors of a state dict, which may be inside ``state_dict``, or of an embedding.

    Only methods of the types are called: a file can set the attributes of an OrderedDict.
    """
    if not isinstance(loaded, dict):
        raise ValueError(f"it holds a {type(loaded).__name__}, not a state dict")
    if "string_to_param" in loaded:
        return _embedding(loaded, stem)
    weights = dict.get(loaded, "state_dict", loaded)
    dropped = [] if weights is loaded else [quote(key) for key in loaded if key != "state_dict"]
    if not isinstance(weights, dict):
        raise ValueError(f"'state_dict' holds a {type(weights).__name__}, not tensors by name")
    tensors: dict[str, Tensor] = {}
    for name in weights:
        value = weights[name]
        if isinstance(value, Tensor) and (tensor := _plain(name, value)).numel():
            tensors[name] = tensor
        elif value is None or isinstance(value, Tensor | int | float | complex | str | bytes | _StandIn):
            dropped.append(quote(name))
        else:
            raise ValueError(
                f"{quote(name)} holds a {type(value).__name__}; tensors by name are allowed, also in 'state_dict'"
            )
    return State(tensors, dropped)


def _embedding(loaded: dict[object, object], stem: str) -> State:
    """A textual-inversion embedding: its vectors under the token's name, as in a file of one tensor."""
    vectors = loaded["string_to_param"]
    if isinstance(vectors, _StandIn) and isinstance(vectors.state, dict):
        vectors = dict.get(vectors.state, "_parameters")
    tensors = [vectors[token] for token in vectors] if isinstance(vectors, dict) else []
    if len(tensors) != 1 or not isinstance(tensors[0], Tensor):
        raise ValueError("'string_to_param' does not hold exactly one tensor")
    name = dict.get(loaded, "name")
    name = name if isinstance(name, str) and name else stem
    dropped = [quote(key) for key in loaded if key not in ("string_to_param", "name")]
    return State({name: _plain(name, tensors[0])}, dropped)


def _plain(name: object, tensor: Tensor) -> Tensor:
    """The detached tensor, if it is dense and a safetensors file can hold it and its name."""
    if not isinstance(name, str) or not name or name == "__metadata__" or "\0" in name:
        raise ValueError(f"{quote(name)} cannot be the name of a tensor")
    name.encode()  # UnicodeEncodeError, which is a ValueError, for lone surrogates
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_meta:
        raise ValueError(f"tensor {quote(name)} is sparse, nested or without values")
    storage = tensor.untyped_storage().nbytes()
    if tensor.dtype not in DTYPE_NAMES or tensor.ndim > MAX_DIMENSIONS or tensor.nbytes > storage:
        raise ValueError(
            f"tensor {quote(name)} of {tensor.dtype} has {tensor.ndim} dimensions and {tensor.nbytes:,} bytes of "
            f"a storage of {storage:,}; allowed are {MAX_DIMENSIONS} dimensions of plain numbers in their storage"
        )
    return tensor.detach().resolve_neg()
