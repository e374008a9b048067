"""The child process that reads a pickle with torch's restricted unpickler, under limits, and writes to stdout.

:mod:`latentgen.checkpoints.convert` starts it. :func:`main` lowers the limits of its process and blocks most system
calls, so call it only in a process of its own.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import sys
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from latentgen.checkpoints.io import DTYPE_NAMES, MAX_DIMENSIONS, MAX_HEADER_BYTES, MAX_TENSORS, write_tensors
from latentgen.errors import CheckpointCorruptError, LatentgenError, UnsafeCheckpointError
from latentgen.files import quote

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
    """Write the tensors of the pickle ``argv[1]`` to stdout, as dtype ``argv[2]`` (empty keeps each one's own), in
    ``argv[3]`` seconds of CPU time; the last line on stderr is a JSON object with ``dropped`` or ``error``.
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
    storages = [tensor.untyped_storage() for tensor in state.tensors.values()]
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
        if not archive and _is_tar(source):
            raise CheckpointCorruptError(f"{quote(source)} is in the format of torch before 0.1.10")
        with warnings.catch_warnings(), torch.serialization.safe_globals(stand_ins):
            warnings.simplefilter("ignore")
            if source.suffix == ".safetensors":  # torch goes by the name
                with open(source, "rb") as file:
                    return torch.load(file, map_location="cpu", weights_only=True)
            return torch.load(source, map_location="cpu", weights_only=True, mmap=archive)
    except LatentgenError:
        raise
    except Exception as error:  # a damaged file can raise anything inside torch
        raise _explained(source, error) from error


def _is_tar(source: Path) -> bool:
    try:
        tarfile.open(source, "r:").close()
    except tarfile.TarError:
        return False
    return True


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
