"""Training sets in tar files, in the layout of WebDataset: read in place, in an order that keeps reads together."""

from __future__ import annotations

import glob
import hashlib
import json
import random
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from latentgen.errors import DatasetError, InputError
from latentgen.files import quote
from latentgen.image_file import read_image_bytes
from latentgen.train.cache import TensorCache, content_key
from latentgen.train.config import WebDataset
from latentgen.train.data import Sample, digest_of
from latentgen.train.data.archive import ArchiveSample, ArchiveSurvey, leave_out, refuse
from latentgen.train.data.cropping import Cropper, Size
from latentgen.train.data.sampler import SHARDS_TOGETHER
from latentgen.train.data.tar_index import (
    Extent,
    OpenTar,
    Samples,
    ShardSurvey,
    decode_captions,
    survey_shard,
)
from latentgen.train.distributed import gather, own_share

_OPEN_FILES = 4 * SHARDS_TOGETHER
_MAX_SHARDS = 100_000
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_WILDCARD = re.compile(r"[*?[]")
_NO_SAMPLE = "no sample: an image (.jpg, .jpeg, .png or .webp) with a .txt or a .json"


class ShardSet:
    """The samples of tar files; see WebDataset for what they are.

    First the headers of all shards are read, and with `check_images` the samples as well; with an `index_dir` each
    process of a run reads its share. Then a sample is one read at its offset in a shard, which is opened on demand.

    Attributes:
        image_size: the side of the views.
        is_random: whether two views of a sample can differ.
        shard_counts: how many samples each shard has, by which items are numbered and sampled.
        digest: of the sizes of the shards, and of the offsets of the samples in them.

    Raises:
        DatasetError: listing what is wrong with the shards.
    """

    def __init__(self, config: WebDataset) -> None:
        self.image_size = config.image_size
        self._cropper = Cropper(config)
        self.is_random = self._cropper.varies
        self._paths = expand_shards(config.shards)
        self._stamps = {path: _stamp(path) for path in self._paths}
        surveys = _survey_all(self._paths, config)
        problems = [problem for survey in surveys for problem in survey.problems]
        bad = [problem for survey in surveys for problem in survey.bad_images]
        if config.on_bad_image == "skip":
            leave_out(bad)
        else:
            problems += bad
        self._samples = [survey.samples for survey in surveys]
        self.shard_counts = tuple(len(samples.json) for samples in self._samples)
        if not any(self.shard_counts) and not problems:
            problems.append(_NO_SAMPLE)
        refuse(f"data.shards ({len(self._paths):,} files)", problems)
        self.digest = digest_of(
            (self._stamps[path][0], hashlib.sha256(samples.extents.tobytes()).digest())
            for path, samples in zip(self._paths, self._samples, strict=True)
        )
        self._ends = list(accumulate(self.shard_counts))
        self._open = lru_cache(_OPEN_FILES)(self._open_unchanged)

    def __len__(self) -> int:
        return self._ends[-1]

    def bucket(self, index: int) -> Size:
        """Height and width of the views of item `index`."""
        shard, place = self._place(index)
        height, width = map(int, self._samples[shard].sizes[place])
        return self._cropper.size_for((height, width))

    def sample(self, index: int, rng: random.Random) -> Sample:
        """The image scaled to cover its rectangle, and cropped; random where the recipe says so.

        Raises:
            DatasetError: the sample cannot be used.
        """
        archive, image, caption, is_json = self._locate(index)
        try:
            picture = read_image_bytes(archive.read(image), f"{archive.path}, {image.name}")
        except InputError as error:
            raise DatasetError(str(error)) from error
        texts = self._cropper.texts(_captions(archive, caption, is_json=is_json))
        return self._cropper.sample(picture, texts, rng)

    def captions(self) -> list[str]:
        """All captions, read for this."""
        places = (self._locate(index) for index in range(len(self)))
        return [
            text
            for archive, _, caption, is_json in places
            for text in self._cropper.texts(_captions(archive, caption, is_json=is_json))
        ]

    def _place(self, index: int) -> tuple[int, int]:
        """The shard of a sample, and its number in it."""
        shard = bisect_right(self._ends, index)
        return shard, index - (self._ends[shard] - self.shard_counts[shard])

    def _locate(self, index: int) -> tuple[OpenTar, Extent, Extent, bool]:
        """The shard of a sample, the extents of its image and its caption, and whether that is JSON."""
        shard, place = self._place(index)
        samples = self._samples[shard]
        image_begin, image_length, caption_begin, caption_length = map(int, samples.extents[place])
        archive = self._open(self._paths[shard])
        image = Extent(f"image at byte {image_begin:,}", image_begin, image_length)
        caption = Extent(f"caption at byte {caption_begin:,}", caption_begin, caption_length)
        return archive, image, caption, bool(samples.json[place])

    def _open_unchanged(self, path: Path) -> OpenTar:
        try:
            archive = OpenTar(path)
            if _stamp(path) == self._stamps[path]:
                return archive
        except (InputError, OSError) as error:
            raise DatasetError(f"{quote(path)} cannot be opened: {error}") from error
        raise DatasetError(
            f"{quote(path)} was changed while the run used it; resume the run with the original file"
        )


def survey(config: WebDataset) -> ArchiveSurvey:
    """Read every sample of the shards.

    Raises:
        DatasetError: a shard is not there.
    """
    paths = expand_shards(config.shards)
    samples: list[ArchiveSample] = []
    problems: list[str] = []
    for path, found in zip(paths, _survey_all(paths, config), strict=True):
        problems += [*found.problems, *found.bad_images]
        archive = OpenTar(path) if len(found.samples.json) else None
        for extents, is_json, size in zip(*found.samples, strict=True):
            assert archive is not None  # there are samples
            image_begin, _, begin, length = map(int, extents)
            captions = _captions(
                archive, Extent(f"caption at byte {begin:,}", begin, length), is_json=bool(is_json)
            )
            height, width = map(int, size)
            samples.append(
                ArchiveSample(f"{path.name}, image at byte {image_begin:,}", (height, width), captions)
            )
    if not samples and not problems:
        problems.append(_NO_SAMPLE)
    return ArchiveSurvey(samples, problems)


def _captions(archive: OpenTar, caption: Extent, *, is_json: bool) -> tuple[str, ...]:
    try:
        return decode_captions(archive.read(caption), is_json=is_json)
    except InputError as error:
        raise DatasetError(f"{quote(archive.path)}, {caption.name}: {error}") from error


def _survey_all(paths: Sequence[Path], config: WebDataset) -> list[ShardSurvey]:
    """The samples and problems of every shard: from `index_dir`, or read now."""
    index = None if config.index_dir is None else TensorCache(config.index_dir)
    found: dict[Path, ShardSurvey] = {}
    if index is not None:
        shared = {path: _survey(path, config, index) for path in _bar(own_share(paths))}
        index.flush()
        found = dict(gather([(path, survey) for path, survey in shared.items() if not _fits_index(survey)]))
        index.refresh()
    left = [path for path in paths if path not in found]
    found |= {path: _survey(path, config, index) for path in _bar(left, disable=index is not None)}
    if index is not None:
        index.flush()  # on a machine that does not see the folder of the others
    return [found[path] for path in paths]


def _survey(path: Path, config: WebDataset, index: TensorCache | None) -> ShardSurvey:
    if index is None:
        return survey_shard(path, decode=config.check_images)
    keys = _index_keys(path)
    for decoded in (True, False):
        if decoded or not config.check_images:
            entry = index.get(keys[decoded])
            if entry is not None:
                samples = Samples(*(entry[name].numpy() for name in Samples._fields))
                return ShardSurvey(samples, [], json.loads(entry["bad_images"].numpy().tobytes()))
    survey = survey_shard(path, decode=config.check_images)
    if _fits_index(survey):
        arrays = {name: torch.from_numpy(array) for name, array in survey.samples._asdict().items()}
        bad = torch.from_numpy(np.frombuffer(json.dumps(survey.bad_images).encode(), np.uint8).copy())
        index.put(keys[config.check_images], {**arrays, "bad_images": bad})
    return survey


def _fits_index(survey: ShardSurvey) -> bool:
    """Whether the index stores a survey: none with problems, which the user will fix, and no empty arrays."""
    return not survey.problems and len(survey.samples.json) > 0


def _index_keys(path: Path) -> dict[bool, str]:
    """The keys of a shard, as it is now, in the index: with its samples decoded, and without."""
    parts = ("shard", str(path.resolve()), *map(str, _stamp(path)))
    return {decoded: content_key(*parts, str(decoded)) for decoded in (True, False)}


def _stamp(path: Path) -> tuple[int, int]:
    """What changes with the content of a file: its size, and when it was written."""
    state = path.stat()
    return state.st_size, state.st_mtime_ns


def _bar(paths: Sequence[Path], *, disable: bool = False) -> Iterable[Path]:
    return tqdm(paths, desc="reading the shards", unit="shard", mininterval=1.0, disable=disable)


def expand_shards(names: Sequence[str]) -> list[Path]:
    """The files that the names of a recipe match: `{000..127}` counts, with as many digits, and `*?[]` are globs.

    Raises:
        DatasetError: a file is not there or named twice, or there are too many.
    """
    problems: list[str] = []
    paths: list[Path] = []
    for name in names:
        for expanded in _counted(name):
            found = sorted(glob.glob(expanded)) if _WILDCARD.search(expanded) else [expanded]
            if not found:
                problems.append(f"{quote(expanded)} matches no file")
            paths += map(Path, found)
            if len(paths) > _MAX_SHARDS:
                raise DatasetError(
                    f"data.shards: {quote(name)} matches over {_MAX_SHARDS:,} files; name fewer"
                )
    problems += [f"{quote(path)} is not a file that exists" for path in paths if not path.is_file()]
    seen: set[Path] = set()
    for path in paths:
        if path in seen:
            problems.append(f"{quote(path)} is named twice")
        seen.add(path)
    refuse("data.shards", problems)
    return paths


def _counted(name: str) -> Iterator[str]:
    match = _RANGE.search(name)
    if match is None:
        yield name
        return
    first, last = int(match[1]), int(match[2])
    if last < first or last - first >= _MAX_SHARDS:
        raise DatasetError(
            f"data.shards: {quote(match[0])} must count up, over at most {_MAX_SHARDS:,} numbers"
        )
    for number in range(first, last + 1):
        yield from _counted(f"{name[: match.start()]}{number:0{len(match[1])}}{name[match.end() :]}")
