"""The offsets of the samples in a tar file, so that each can be read by itself; nothing is ever unpacked."""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from latentgen.errors import InputError
from latentgen.files import quote, wrong_content
from latentgen.train.data.archive import (
    MAX_CAPTION_BYTES,
    MAX_IMAGE_BYTES,
    image_size,
    json_captions,
    text_captions,
)
from latentgen.train.data.image_checks import in_threads

IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp"})
CAPTION_SUFFIXES = ("txt", "json")
# As in the webdataset library: the key ends at the first dot of the file's name, and __meta__ files are none.
_NAME = re.compile(r"((?:.*/|)[^.]+)\.([^/]*)")
_META = re.compile(r"__[^/]*__($|/)")
_BLOCK = 512
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")


class Extent(NamedTuple):
    """The bytes of one member of a tar file."""

    name: str
    begin: int
    length: int


class TarSample(NamedTuple):
    """An image and its caption, which is JSON or text."""

    image: Extent
    caption: Extent

    @property
    def has_json(self) -> bool:
        """Whether the caption is JSON."""
        return self.caption.name.lower().endswith(".json")


class Samples(NamedTuple):
    """The samples of one shard as arrays.

    Attributes:
        extents: first byte and length of the image, and those of the caption: int64 [samples, 4].
        json: whether the caption is JSON: uint8 [samples].
        sizes: height and width of the images, 0 if unknown: int32 [samples, 2].
    """

    extents: NDArray[np.int64]
    json: NDArray[np.uint8]
    sizes: NDArray[np.int32]


class ShardSurvey(NamedTuple):
    """The samples of a shard, its problems, and its bad images."""

    samples: Samples
    problems: list[str]
    bad_images: list[str]


def survey_shard(path: Path, *, decode: bool) -> ShardSurvey:
    """List the samples of a tar file from its headers; with `decode` each is read as well."""
    problems: list[str] = []
    samples = _pair(path, _members(path, problems), problems)
    bad: list[str] = []
    sizes = [(0, 0)] * len(samples)
    if decode:
        archive = OpenTar(path)
        results = in_threads(lambda sample: _read_sample(archive, sample), samples)
        problems += [result.caption_problem for result in results if result.caption_problem]
        bad = [result.image_problem for result in results if result.image_problem]
        kept = [
            place
            for place, result in enumerate(results)
            if result.size is not None and result.caption_problem is None
        ]
        samples = [samples[place] for place in kept]
        sizes = [results[place].size or (0, 0) for place in kept]
    extents = [(*sample.image[1:], *sample.caption[1:]) for sample in samples]
    return ShardSurvey(
        Samples(
            np.array(extents, np.int64).reshape(-1, 4),
            np.array([sample.has_json for sample in samples], np.uint8),
            np.array(sizes, np.int32).reshape(-1, 2),
        ),
        problems,
        bad,
    )


class OpenTar:
    """A tar file to read members of, from several threads and from processes that were forked."""

    def __init__(self, path: Path) -> None:
        """Open a file; it is closed with the last reference.

        Raises:
            InputError: it cannot be opened.
        """
        self.path = path
        self._lock = Lock()
        try:
            self._descriptor = os.open(path, os.O_RDONLY | (os.O_BINARY if os.name == "nt" else 0))
        except OSError as error:
            raise InputError(f"{quote(path)} cannot be opened: {error.strerror or error}") from error

    def __del__(self) -> None:
        with suppress(AttributeError, OSError):  # it was never opened
            os.close(self._descriptor)

    def read(self, member: Extent) -> bytes:
        """The bytes of a member.

        Raises:
            InputError: they cannot be read, or the file has become shorter.
        """
        try:
            data = self._read(member)
        except OSError as error:
            raise InputError(
                f"{quote(self.path)}, {member.name}, cannot be read: {error.strerror or error}"
            ) from error
        if len(data) != member.length:
            raise InputError(f"{quote(self.path)}, {member.name}, is cut off: the file has become shorter")
        return data

    def _read(self, member: Extent) -> bytes:
        if hasattr(os, "pread"):  # not on Windows; forked processes share the position that read() moves
            return os.pread(self._descriptor, member.length, member.begin)
        with self._lock:
            os.lseek(self._descriptor, member.begin, os.SEEK_SET)
            return os.read(self._descriptor, member.length)


def decode_captions(data: bytes, *, is_json: bool) -> tuple[str, ...]:
    """The captions of a sample.

    Raises:
        InputError: there is none that can be encoded.
    """
    return json_captions(data) if is_json else text_captions(data)


class _DecodedSample(NamedTuple):
    size: tuple[int, int] | None
    image_problem: str | None
    caption_problem: str | None


def _read_sample(archive: OpenTar, sample: TarSample) -> _DecodedSample:
    size = image_problem = caption_problem = None
    try:
        size = image_size(archive.read(sample.image), f"{archive.path}, {sample.image.name}")
    except InputError as error:
        image_problem = str(error)
    try:
        decode_captions(archive.read(sample.caption), is_json=sample.has_json)
    except InputError as error:
        caption_problem = f"{quote(archive.path)}, {quote(sample.caption.name)}: {error}"
    return _DecodedSample(size, image_problem, caption_problem)


def _members(path: Path, problems: list[str]) -> Iterator[Extent]:
    """The files in a tar file; problems of the archive itself are added to `problems`."""
    try:
        with open(path, "rb") as file:
            head = file.read(_BLOCK)
            if head.startswith(_COMPRESSED):
                problems.append(
                    f"{quote(path)} is compressed, so that no sample can be read by itself; decompress it"
                )
                return
            if (problem := wrong_content(head)) and (head.strip(b"\0") or not head):
                problems.append(f"{quote(path)} is {problem}; download it again")
                return
            yield from _headers(path, problems)
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
        problems.append(f"{quote(path)} cannot be read as a tar file ({error}); download it again")


def _headers(path: Path, problems: list[str]) -> Iterator[Extent]:
    archive: Any  # the stubs know nothing of its members
    with tarfile.open(path, "r:") as archive:
        end = 0
        while (member := archive.next()) is not None:
            archive.members = []  # tarfile keeps all of them otherwise
            if archive.offset <= end or member.size < 0:
                problems.append(f"{quote(path)} is damaged after byte {end:,}; download it again")
                return
            end = archive.offset
            if member.isreg() and not member.issparse():
                yield Extent(member.name, member.offset_data, member.size)
        # tarfile takes a damaged header for the end as well.
        with open(path, "rb") as file:
            file.seek(archive.offset)
            block = file.read(_BLOCK)
    if not block:
        problems.append(
            f"{quote(path)} ends at byte {end:,} without an end-of-archive mark; download it again"
        )
    elif block.strip(b"\0"):
        problems.append(f"{quote(path)} is damaged at byte {end:,}; download it again")


def _pair(path: Path, members: Iterator[Extent], problems: list[str]) -> list[TarSample]:
    """The samples, in the order of their first members."""
    samples: dict[str, dict[str, Extent]] = {}
    for member in members:
        match = _NAME.fullmatch(member.name)
        if match is None or _META.match(member.name):
            continue
        key, suffix = match[1], match[2].lower()
        kind = "image" if suffix in IMAGE_SUFFIXES else suffix
        if kind != "image" and kind not in CAPTION_SUFFIXES:
            continue
        where = f"{quote(path)}, {quote(member.name)}"
        limit = MAX_IMAGE_BYTES if kind == "image" else MAX_CAPTION_BYTES
        if member.length > limit:
            problems.append(f"{where} has {member.length:,} bytes; at most {limit:,} are read")
        sample = samples.setdefault(key, {})
        if kind in sample:
            problems.append(f"{where}: its sample has {quote(sample[kind].name)} already")
        sample[kind] = member
    pairs: list[TarSample] = []
    for key, sample in samples.items():
        image = sample.get("image")
        caption = next((sample[suffix] for suffix in CAPTION_SUFFIXES if suffix in sample), None)
        if image is not None and caption is not None:
            if image.length <= MAX_IMAGE_BYTES and caption.length <= MAX_CAPTION_BYTES:
                pairs.append(TarSample(image, caption))
        elif image is not None:
            problems.append(
                f"{quote(path)}, {quote(image.name)}: no caption; there must be a {quote(key + '.txt')}"
            )
        elif "txt" in sample:
            problems.append(f"{quote(path)}, {quote(key + '.txt')}: a caption without an image")
    return pairs
