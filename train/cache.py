"""A cache of tensors, keyed by a hash of their inputs: in memory, or on disk, where runs and processes share it."""

from __future__ import annotations

import hashlib
import re
import secrets
import time
import warnings
import zlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from latentgen.checkpoints.io import MappedFile, write_tensors
from latentgen.errors import CheckpointCorruptError, CheckpointError
from latentgen.files import atomic_write, quote

# A pack is written when it reaches one of these sizes or this age, so a killed run loses no more than that.
PACK_BYTES = 64 * 2**20
PACK_ENTRIES = 4096
PACK_SECONDS = 60.0
_SUFFIX = ".safetensors"
_NAME = re.compile(r"[0-9a-f]{64}/[a-z_]+")
# Temporary files older than this are left over from a killed process, and are deleted.
_STALE_SECONDS = 24 * 3600.0


class _Place(NamedTuple):
    pack: MappedFile
    names: list[str]


class TensorCache:
    """A folder of entries, each a few tensors under a key from :func:`content_key`; tensors are read memory-mapped.

    Entries are stored in packs, safetensors files of up to 64 MiB with random names: a million files of one entry each
    would be slow to list, copy and delete. A pack appears when it is complete and is never modified, so any number of
    processes can read and write at the same time; if two compute the same entry, both write it, which only costs
    space. Every tensor has a checksum: a damaged pack is deleted with a warning, and its entries are computed again.
    The folder may be deleted whenever no run uses it.

    Use an object from one thread only; after a fork, parent and child may both read.

    Args:
        folder: where the packs are, created with the first one; None keeps the entries in memory.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._known: set[str] = set()
        self._places: dict[str, _Place] = {}
        self._pending: dict[str, dict[str, Tensor]] = {}
        self._pending_bytes = 0
        self._pending_since = 0.0
        self.refresh()

    def __contains__(self, key: str) -> bool:
        return key in self._pending or key in self._places

    def __len__(self) -> int:
        return len(self._pending.keys() | self._places.keys())

    def refresh(self) -> None:
        """Find the packs that other processes have written; damaged ones are deleted."""
        if self.folder is None or not self.folder.is_dir():
            return
        for file in sorted(self.folder.iterdir()):
            if file.suffix == _SUFFIX and file.name not in self._known:
                self._known.add(file.name)
                self._open(file)
            elif file.suffix == ".tmp":
                with suppress(OSError):  # another process was faster
                    if time.time() - file.stat().st_mtime > _STALE_SECONDS:
                        file.unlink()

    def get(self, key: str) -> dict[str, Tensor] | None:
        """The tensors of an entry, not to be written to; None if there is none, or only a damaged one."""
        if key in self._pending:
            return self._pending[key]
        place = self._places.get(key)
        if place is None:
            return None
        tensors = {name: place.pack.tensor(name) for name in place.names}
        if any(_checksum(tensor) != place.pack.header.metadata[name] for name, tensor in tensors.items()):
            self._discard(place.pack.path, "does not match its checksums")
            return None
        return {name.partition("/")[2]: tensor for name, tensor in tensors.items()}

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Store an entry. It reaches the disk with the pack that it is part of, with :meth:`flush` at the latest.

        Raises:
            OutputError: a pack cannot be written.
        """
        if not self._pending:
            self._pending_since = time.monotonic()
        self._pending[key] = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        self._pending_bytes += sum(tensor.nbytes for tensor in tensors.values())
        full = self._pending_bytes >= PACK_BYTES or len(self._pending) >= PACK_ENTRIES
        if full or time.monotonic() - self._pending_since >= PACK_SECONDS:
            self.flush()  # in memory, entries stay pending

    def flush(self) -> None:
        """Write what is not on the disk yet.

        Raises:
            OutputError: it cannot be written.
        """
        if not self._pending or self.folder is None:
            return
        tensors = {
            f"{key}/{name}": tensor for key, entry in self._pending.items() for name, tensor in entry.items()
        }
        file = self.folder / f"{secrets.token_hex(16)}{_SUFFIX}"
        with atomic_write(file) as pack:
            write_tensors(pack, tensors, {name: _checksum(tensor) for name, tensor in tensors.items()})
        self._known.add(file.name)
        self._open(file)
        self._pending, self._pending_bytes = {}, 0

    def _open(self, file: Path) -> None:
        try:
            pack = MappedFile(file)
        except CheckpointCorruptError as error:
            self._discard(file, str(error))
            return
        except CheckpointError as error:
            if file.exists():  # else another process has deleted it
                warnings.warn(f"{quote(file)} of the cache is ignored: {error}", stacklevel=2)
            return
        are_ours = all(map(_NAME.fullmatch, pack.header))
        if not are_ours or pack.header.metadata.keys() != pack.header.keys():
            self._discard(file, "not a pack of this cache")
            return
        names: dict[str, list[str]] = {}
        for name in pack.header:
            names.setdefault(name.partition("/")[0], []).append(name)
        self._places |= {key: _Place(pack, own) for key, own in names.items()}

    def _discard(self, file: Path, reason: str) -> None:
        warnings.warn(
            f"{quote(file)} of the cache is damaged and is deleted; its entries are computed again ({reason})",
            stacklevel=3,
        )
        self._places = {key: place for key, place in self._places.items() if place.pack.path != file}
        with suppress(OSError):  # another process was faster, or the folder may only be read
            file.unlink()


def content_key(*parts: str | bytes) -> str:
    """The sha256 of a sequence of texts and bytes, in hexadecimal; different sequences have different keys."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8") if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def weights_digest(modules: Iterable[nn.Module]) -> str:
    """The sha256 of the names, dtypes, shapes and values of all parameters and persistent buffers."""
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(_bytes_of(tensor))
        digest.update(b"\n")
    return digest.hexdigest()


def _checksum(tensor: Tensor) -> str:
    return f"{zlib.crc32(_bytes_of(tensor)):08x}"


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
