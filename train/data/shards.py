"""Training sets in tar files, in the layout of WebDataset: read in place, in an order that keeps reads together."""

from __future__ import annotations

import glob
import hashlib
import json
import random
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import torch
from tqdm import tqdm

from latentgen.errors import DatasetError, InputError
from latentgen.files import quote
from latentgen.image_file import read_image_bytes
from latentgen.train.cache import TensorCache, content_key
from latentgen.train.config import WebDataset
from latentgen.train.data import Sample, digest_of
from latentgen.train.data.cropping import Cropper, Size
from latentgen.train.data.sample_checks import DataSurvey, UsableSample, refuse
from latentgen.train.data.sampler import SHARDS_TOGETHER
from latentgen.train.data.tar_index import Member, OpenTar, ShardSurvey, survey_shard
from latentgen.train.distributed import gather, own_share

_OPEN_FILES = 4 * SHARDS_TOGETHER
_MAX_SHARDS = 100_000
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_WILDCARD = re.compile(r"[*?[]")
_NO_SAMPLE = "no sample: an image (.jpg, .jpeg, .png or .webp) with a .txt or a .json"


class ShardSet:
    """The samples of tar files, as described by WebDataset.

    First the headers of all shards are read, and with `check_images` the samples as well; each process of a run reads
    its share. Then a sample is one read at its offset in a shard, which is opened on demand.

    Attributes:
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
        where = f"data.shards ({len(self._paths):,} files)"
        refuse(where, problems, bad, skip=config.on_bad_image == "skip")
        self._samples = [survey.samples for survey in surveys]
        self.shard_counts = tuple(map(len, self._samples))
        if not any(self.shard_counts):
            raise DatasetError(f"{where} has {_NO_SAMPLE}")
        self.digest = digest_of(
            (self._stamps[path][0], hashlib.sha256(samples[:, :4].tobytes()).digest())
            for path, samples in zip(self._paths, self._samples, strict=True)
        )
        self._ends = list(accumulate(self.shard_counts))
        self._open = lru_cache(_OPEN_FILES)(self._open_unchanged)

    def __len__(self) -> int:
        return self._ends[-1]

    def bucket(self, index: int) -> Size:
        """Height and width of the views of item `index`."""
        _, row = self._row(index)
        return self._cropper.size_for((row[5], row[6]))

    def sample(self, index: int, rng: random.Random) -> Sample:
        """The image scaled to cover its rectangle, and cropped; random where the recipe says so.

        Raises:
            DatasetError: the sample cannot be used.
        """
        path, row = self._row(index)
        archive = self._open(path)
        image = Member(f"image at byte {row[0]:,}", row[0], row[1])
        try:
            picture = read_image_bytes(archive.read(image), f"{path}, {image.name}")
        except InputError as error:
            raise DatasetError(str(error)) from error
        return self._cropper.sample(picture, _captions(archive, row), rng)

    def captions(self) -> list[str]:
        """All captions, read for this."""
        rows = (self._row(index) for index in range(len(self)))
        return [text for path, row in rows for text in self._cropper.texts(_captions(self._open(path), row))]

    def _row(self, index: int) -> tuple[Path, list[int]]:
        """The shard of a sample, and its row of `ShardSurvey.samples`."""
        shard = bisect_right(self._ends, index)
        place = index - (self._ends[shard] - self.shard_counts[shard])
        return self._paths[shard], self._samples[shard][place].tolist()

    def _open_unchanged(self, path: Path) -> OpenTar:
        archive = OpenTar(path)
        if _stamp(path) != self._stamps[path]:
            raise DatasetError(f"{quote(path)} was changed during the run; resume with the original file")
        return archive


def survey(config: WebDataset) -> DataSurvey:
    """Read every sample of the shards.

    Raises:
        DatasetError: a shard does not exist.
    """
    paths = expand_shards(config.shards)
    open_tar = lru_cache(1)(OpenTar)
    samples: list[UsableSample] = []
    problems: list[str] = []
    for path, shard in zip(paths, _survey_all(paths, config), strict=True):
        problems += [*shard.problems, *shard.bad_images]
        rows: list[list[int]] = shard.samples.tolist()
        for row in rows:
            name = f"{path.name}, image at byte {row[0]:,}"
            samples.append(UsableSample(name, (row[5], row[6]), _captions(open_tar(path), row)))
    if not samples and not problems:
        problems.append(_NO_SAMPLE)
    return DataSurvey(samples, problems)


def _captions(archive: OpenTar, row: Sequence[int]) -> tuple[str, ...]:
    member = Member(f"caption at byte {row[2]:,}", row[2], row[3])
    return archive.captions(member, is_json=bool(row[4]))


def _survey_all(paths: Sequence[Path], config: WebDataset) -> list[ShardSurvey]:
    """The content of every shard. Processes share the work if they share an `index_dir`."""
    index = TensorCache(config.index_dir)
    own = {path: _survey(path, config, index) for path in _bar(own_share(paths))}
    index.flush()
    unindexed = dict(gather([(path, shard) for path, shard in own.items() if not _fits_index(shard)]))
    index.refresh()
    surveys = [unindexed.get(path) or _survey(path, config, index) for path in _bar(paths)]
    index.flush()  # on a machine that does not see the folder of the others
    return surveys


def _survey(path: Path, config: WebDataset, index: TensorCache) -> ShardSurvey:
    """The content of a shard: from the index if it has the shard as it is now, else read."""
    shard = ("shard samples", str(path.resolve()), *map(str, _stamp(path)))
    checked, unchecked = (content_key(*shard, decoded) for decoded in ("decoded", "headers"))
    for key in (checked,) if config.check_images else (checked, unchecked):
        if (entry := index.get(key)) is not None:
            bad_images = json.loads(entry["bad_images"].numpy().tobytes())
            return ShardSurvey(entry["samples"].numpy(), [], bad_images)
    survey = survey_shard(path, decode=config.check_images)
    if _fits_index(survey):
        bad = torch.frombuffer(bytearray(json.dumps(survey.bad_images).encode()), dtype=torch.uint8)
        samples = torch.from_numpy(survey.samples)
        index.put(checked if config.check_images else unchecked, {"samples": samples, "bad_images": bad})
    return survey


def _fits_index(survey: ShardSurvey) -> bool:
    """Whether the index stores a survey: none with problems, which the user will fix, and no empty arrays."""
    return not survey.problems and len(survey.samples) > 0


def _stamp(path: Path) -> tuple[int, int]:
    """What changes with the content of a file: its size, and when it was written."""
    state = path.stat()
    return state.st_size, state.st_mtime_ns


def _bar(paths: Sequence[Path]) -> Iterable[Path]:
    return tqdm(paths, "reading the shards", unit="shard", mininterval=1.0, delay=1.0)


def expand_shards(names: Sequence[str]) -> list[Path]:
    """The files that the names of a recipe match: `{000..127}` counts, with as many digits, and `*?[]` are globs.

    Raises:
        DatasetError: a file does not exist or is named twice, or there are too many.
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
                raise DatasetError(f"data.shards: {quote(name)} matches over {_MAX_SHARDS:,} files")
    problems += [f"{quote(path)} does not exist or is not a file" for path in paths if not path.is_file()]
    problems += [f"{quote(path)} is named twice" for path, count in Counter(paths).items() if count > 1]
    refuse("data.shards", problems)
    return paths


def _counted(name: str) -> Iterator[str]:
    match = _RANGE.search(name)
    if match is None:
        yield name
        return
    first, last = int(match[1]), int(match[2])
    if last < first or last - first >= _MAX_SHARDS:
        raise DatasetError(f"data.shards: {quote(match[0])} must count up, by at most {_MAX_SHARDS:,}")
    for number in range(first, last + 1):
        yield from _counted(f"{name[: match.start()]}{number:0{len(match[1])}}{name[match.end() :]}")
