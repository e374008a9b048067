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

# CPU time of the child: for importing torch, and for reading the file. The wall clock runs faster on a busy machine.
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
    source: Path, target: Path, dtype: str | None, advance: Callable[[int], object]
) -> tuple[int, tuple[str, ...]]:
    """Write the tensors of a pickle to a safetensors file.

    A child process with torch's restricted unpickler reads it, under limits of memory, time and open files. It takes
    tensors by name, also inside ``state_dict``; numbers, texts and the state of training are left out, as are tensors
    without elements. A textual-inversion embedding becomes one tensor with the name of its token.

    Args:
        dtype: what floating-point tensors become, such as "float16"; None keeps each one's own.
        advance: called with the number of bytes written since the last call.

    Returns:
        The number of tensors, and the names of the entries that were left out.

    Raises:
        InputError: the file is a safetensors file.
        UnsafeCheckpointError: it references code that weights do not need; nothing was run.
        CheckpointCorruptError: it is damaged, holds no weights, or takes too much time or memory.
        CheckpointValueError: a weight is NaN or infinite, or too large for ``dtype``.
        OutputError: the target cannot be written; existing files are never damaged.
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
    source: Path, dtype: str | None, output: BinaryIO, errors: BinaryIO, advance: Callable[[int], object]
) -> int:
    """Run the child until it ends or its time is over; returns its exit code."""
    seconds = START_SECONDS + source.stat().st_size // BYTES_PER_SECOND
    path = json.dumps([os.path.abspath(entry) for entry in sys.path])
    command = [sys.executable, "-I", "-c", _START, path, str(source), dtype or "", str(seconds)]
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

    Its arguments are the pickle, the dtype (empty keeps each tensor's own) and the seconds of CPU time. The last line
    on stderr is a JSON object with ``dropped`` or ``error``.
    """
    source, dtype, seconds = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # keeps other output out of the file
    report: dict[str, object]
    try:
        torch.set_num_threads(1)
        _limit(source.stat().st_size, seconds)
        sys.addaudithook(_refuse)
        state = read_pickle(source)
        target = next((known for known in DTYPE_NAMES if str(known) == f"torch.{dtype}"), None)
        write_tensors(output, state.tensors, {"format": "pt"}, dtype=target, checked_source=source)
        output.flush()
        beyond = len(state.dropped) - _MAX_NAMES
        more = [f"and {beyond:,} more"] if beyond > 0 else []
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
    size = source.stat().st_size
    with open(source, "rb") as file:
        archive = file.read(4) == b"PK\x03\x04"
    records = _records(source) if archive else None
    state = _extract(_load(source, archive), source)
    if not state.tensors or len(state.tensors) > MAX_TENSORS:
        raise CheckpointCorruptError(
            f"{quote(source)} holds {len(state.tensors):,} tensors; 1 to {MAX_TENSORS:,} are converted"
        )
    storages = (tensor.untyped_storage() for tensor in state.tensors.values())
    distinct = {storage.data_ptr(): storage.nbytes() for storage in storages}
    claimed = sum(distinct.values())
    if claimed > size or (records is not None and not records.issuperset(distinct.values())):
        raise CheckpointCorruptError(
            f"{quote(source)} ({size:,} bytes) declares tensors of {claimed:,} bytes, which it does not hold"
        )
    if (total := sum(tensor.nbytes for tensor in state.tensors.values())) > MAX_GROWTH * size:
        raise CheckpointCorruptError(
            f"{quote(source)} ({size:,} bytes) would become {total:,} bytes, because its tensors overlap; at "
            f"most {MAX_GROWTH} times the size is allowed"
        )
    return state


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
    except (zipfile.BadZipFile, ValueError, OSError, EOFError, NotImplementedError) as error:
        raise CheckpointCorruptError(
            f"{quote(source)} is truncated or damaged ({error}); download the file again"
        ) from error
    for record in records:
        if record.compress_type != zipfile.ZIP_STORED or record.compress_size != record.file_size:
            raise CheckpointCorruptError(
                f"{quote(source)}: the record {quote(record.filename)} is compressed; torch.save never compresses"
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
    except Exception as error:  # a damaged file can raise anything inside torch
        raise _explained(source, error) from error


def _explained(source: Path, error: Exception) -> LatentgenError:
    message = str(error).partition("WeightsUnpickler error:")[2] or str(error)
    if isinstance(error, pickle.UnpicklingError) and (match := _REFUSED.search(message)):
        name = next(group for group in match.groups() if group)
        return UnsafeCheckpointError(
            f"{quote(source)} references {quote(name.strip())}, which weights do not need and which may run code; "
            "nothing was run: ask the author of the file for a .safetensors file"
        )
    reason = message.partition("Check the documentation")[0].strip() or type(error).__name__
    return CheckpointCorruptError(
        f"{quote(source)} cannot be read as a checkpoint of torch: {quote(' '.join(reason.split()))}; "
        "download the file again"
    )


def _extract(loaded: object, source: Path) -> State:
    """The tensors of a state dict, which may be inside ``state_dict``, or of an embedding.

    Only the slots of the types are used: the attributes of an OrderedDict come from the file.
    """
    if not isinstance(loaded, dict):
        raise CheckpointCorruptError(f"{quote(source)} holds a {type(loaded).__name__}, not a state dict")
    if "string_to_param" in loaded:
        return _embedding(loaded, source)
    dropped: list[str] = []
    weights = loaded
    if "state_dict" in loaded:
        weights = loaded["state_dict"]
        dropped = [quote(key) for key in loaded if key != "state_dict"]
        if not isinstance(weights, dict):
            raise CheckpointCorruptError(
                f"{quote(source)}: 'state_dict' holds a {type(weights).__name__}, not tensors by name"
            )
    tensors: dict[str, Tensor] = {}
    for name in weights:
        value = weights[name]
        if isinstance(value, Tensor):
            tensor = _plain(_name(name, source), value, source)
            if tensor.numel():
                tensors[name] = tensor
            else:
                dropped.append(quote(name))
        elif value is None or isinstance(value, int | float | complex | str | bytes | _StandIn):
            dropped.append(quote(name))
        else:
            raise CheckpointCorruptError(
                f"{quote(source)}: {quote(name)} holds a {type(value).__name__} instead of a tensor; allowed are "
                "tensors by name, directly or in 'state_dict'"
            )
    return State(tensors, dropped)


def _embedding(loaded: dict[object, object], source: Path) -> State:
    """A textual-inversion embedding: its vectors under the token's name, as in a file of one tensor."""
    vectors = loaded["string_to_param"]
    if isinstance(vectors, _StandIn) and isinstance(vectors.state, dict):
        vectors = dict.get(vectors.state, "_parameters")
    tensors = [vectors[token] for token in vectors] if isinstance(vectors, dict) else []
    if len(tensors) != 1 or not isinstance(tensors[0], Tensor):
        raise CheckpointCorruptError(f"{quote(source)}: 'string_to_param' does not hold exactly one tensor")
    name = dict.get(loaded, "name")
    if not isinstance(name, str) or not name:
        name = source.stem
    dropped = [quote(key) for key in loaded if key not in ("string_to_param", "name")]
    return State({_name(name, source): _plain(name, tensors[0], source)}, dropped)


def _name(name: object, source: Path) -> str:
    """A tensor's name that a safetensors header can hold."""
    if isinstance(name, str) and name and name != "__metadata__" and "\0" not in name:
        with suppress(UnicodeEncodeError):
            name.encode()
            return name
    raise CheckpointCorruptError(f"{quote(source)}: {quote(name)} cannot be the name of a tensor")


def _plain(name: str, tensor: Tensor, source: Path) -> Tensor:
    """The detached tensor; CheckpointCorruptError if it is not dense and within its storage."""
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_meta:
        kind = "is sparse, nested or without values"
    elif tensor.dtype not in DTYPE_NAMES:
        kind = f"has dtype {tensor.dtype}"
    elif tensor.ndim > MAX_DIMENSIONS:
        kind = f"has {tensor.ndim} dimensions, more than {MAX_DIMENSIONS}"
    elif tensor.nbytes > tensor.untyped_storage().nbytes():
        kind = f"claims {tensor.nbytes:,} bytes of a storage of {tensor.untyped_storage().nbytes():,}"
    else:
        return tensor.detach().resolve_neg()
    raise CheckpointCorruptError(
        f"{quote(source)}: tensor {quote(name)} {kind}; only dense tensors of plain numbers are converted"
    )
