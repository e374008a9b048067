"""The offsets of the samples in a tar file, so that each can be read by itself; nothing is ever unpacked."""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from latentgen.errors import DatasetError, InputError
from latentgen.files import quote, wrong_content
from latentgen.train.data.cropping import Size
from latentgen.train.data.sample_checks import (
    MAX_IMAGE_BYTES,
    CheckedSample,
    check_sample,
    decode_captions,
    in_threads,
)

MAX_CAPTION_BYTES = 2**20
_IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp"})
_CAPTION_SUFFIXES = ("txt", "json")
# As in the webdataset library: the key ends at the first dot of the file's name, and __meta__ files are ignored.
_NAME = re.compile(r"((?:.*/|)[^.]+)\.([^/]*)")
_META = re.compile(r"__[^/]*__($|/)")
_BLOCK = 512
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")


class Member(NamedTuple):
    """A file in a tar file: its name in messages, its first byte, and its length."""

    name: str
    offset: int
    length: int


class ShardSurvey(NamedTuple):
    """The content of a shard.

    Attributes:
        samples: int64 [samples, 7]: first byte and length of the image, and of the caption; 1 if that is JSON; height
            and width of the image, 0 if unknown.
        problems: what prevents training.
        bad_images: problems of images, which a recipe may skip.
    """

    samples: NDArray[np.int64]
    problems: list[str]
    bad_images: list[str]


def survey_shard(path: Path, *, decode: bool) -> ShardSurvey:
    """List the samples of a tar file from its headers; with `decode` each is also read."""
    problems: list[str] = []
    pairs = _pair(path, _members(path, problems), problems)
    bad_images: list[str] = []
    sizes: list[Size | None] = [(0, 0)] * len(pairs)
    if decode:
        archive = OpenTar(path)
        checked = in_threads(lambda pair: archive.check(*pair), pairs)
        problems += [sample.caption_problem for sample in checked if sample.caption_problem]
        bad_images = [sample.image_problem for sample in checked if sample.image_problem]
        sizes = [None if sample.caption_problem else sample.size for sample in checked]
    rows = [
        (*image[1:], *caption[1:], _is_json(caption), *size)
        for (image, caption), size in zip(pairs, sizes, strict=True)
        if size is not None
    ]
    return ShardSurvey(np.array(rows, np.int64).reshape(-1, 7), problems, bad_images)


class OpenTar:
    """A tar file to read members of, from several threads and from forked processes; closed with its last reference.

    All methods raise DatasetError if the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise DatasetError(f"{quote(path)} cannot be opened: {error.strerror or error}") from error

    def __del__(self) -> None:
        with suppress(AttributeError, OSError):  # it was never opened
            os.close(self._descriptor)

    def read(self, member: Member) -> bytes:
        """The bytes of a member."""
        try:
            if hasattr(os, "pread"):
                data = os.pread(self._descriptor, member.length, member.offset)
            else:  # Windows; the descriptor has one position for all threads
                with open(self.path, "rb") as file:
                    file.seek(member.offset)
                    data = file.read(member.length)
        except OSError as error:
            raise DatasetError(f"{self._name(member)} cannot be read: {error.strerror or error}") from error
        if len(data) != member.length:
            raise DatasetError(f"{self._name(member)} is cut off: the file has become shorter")
        return data

    def captions(self, member: Member, *, is_json: bool) -> tuple[str, ...]:
        """The captions in a member; DatasetError if there are none that can be encoded."""
        try:
            return decode_captions(self.read(member), is_json=is_json)
        except InputError as error:
            raise DatasetError(f"{self._name(member)}: {error}") from error

    def check(self, image: Member, caption: Member) -> CheckedSample:
        """Read and decode a sample."""
        return check_sample(
            f"{self.path}, {image.name}",
            lambda: self.read(image),
            lambda: self.captions(caption, is_json=_is_json(caption)),
        )

    def _name(self, member: Member) -> str:
        return f"{quote(self.path)}, {quote(member.name)}"


def _is_json(caption: Member) -> bool:
    return caption.name.lower().endswith(".json")


def _members(path: Path, problems: list[str]) -> Iterator[Member]:
    """The regular files in a tar file; an error of the archive itself is added to `problems`."""
    archive: Any  # the stubs do not have its members
    try:
        with open(path, "rb") as file:
            head = file.read(_BLOCK)
            if head.startswith(_COMPRESSED):
                raise tarfile.ReadError("it is compressed")
            if (problem := wrong_content(head)) and (head.strip(b"\0") or not head):
                raise tarfile.ReadError(f"it is {problem}")
            file.seek(0)
            archive = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 - it holds nothing but the file
            end = 0
            while (member := archive.next()) is not None:
                archive.members = []  # tarfile keeps all of them otherwise
                if archive.offset <= end or member.size < 0:
                    raise tarfile.ReadError(f"it is damaged after byte {end:,}")
                end = archive.offset
                if member.isreg() and not member.issparse():
                    yield Member(member.name, member.offset_data, member.size)
            # tarfile takes a damaged header for the end as well.
            file.seek(archive.offset)
            block = file.read(_BLOCK)
            if not block:
                raise tarfile.ReadError(f"it ends at byte {end:,} without an end-of-archive mark")
            if block.strip(b"\0"):
                raise tarfile.ReadError(f"it is damaged at byte {end:,}")
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
        problems.append(f"{quote(path)} cannot be read as a tar file ({error}); decompress or replace it")


def _pair(path: Path, members: Iterable[Member], problems: list[str]) -> list[tuple[Member, Member]]:
    """The image and the caption of each sample, in the order of their first members."""
    samples: dict[str, dict[str, Member]] = {}
    for member in members:
        match = _NAME.fullmatch(member.name)
        if match is None or _META.match(member.name):
            continue
        key, suffix = match[1], match[2].lower()
        kind = "image" if suffix in _IMAGE_SUFFIXES else suffix
        if kind != "image" and kind not in _CAPTION_SUFFIXES:
            continue
        where = f"{quote(path)}, {quote(member.name)}"
        sample = samples.setdefault(key, {})
        if kind in sample:
            problems.append(f"{where}: its sample already has {quote(sample[kind].name)}")
        sample[kind] = member
        limit = MAX_IMAGE_BYTES if kind == "image" else MAX_CAPTION_BYTES
        if member.length > limit:
            problems.append(f"{where} has {member.length:,} bytes; at most {limit:,} are read")
    pairs: list[tuple[Member, Member]] = []
    for key, sample in samples.items():
        image, caption = sample.get("image"), sample.get("txt", sample.get("json"))
        if image is not None and caption is not None:
            if image.length <= MAX_IMAGE_BYTES and caption.length <= MAX_CAPTION_BYTES:
                pairs.append((image, caption))
        elif image is not None:
            problems.append(f"{quote(path)}, {quote(image.name)}: no caption; add {quote(key + '.txt')}")
        elif "txt" in sample:
            problems.append(f"{quote(path)}, {quote(key + '.txt')}: a caption without an image")
    return pairs
