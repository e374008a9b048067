"""Training sets that the `datasets` library has written to disk, or parquet files; nothing reaches the network."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from latentgen.errors import ConfigError, DatasetError, InputError, LatentgenError
from latentgen.files import quote, read_json, safe_join
from latentgen.image_file import read_image_bytes
from latentgen.train.config import HuggingFaceData
from latentgen.train.data import Sample, digest_of
from latentgen.train.data.cropping import Cropper, Size
from latentgen.train.data.sample_checks import (
    MAX_IMAGE_BYTES,
    CheckedSample,
    DataSurvey,
    UsableSample,
    captions_of,
    check_sample,
    in_threads,
    refuse,
)

if TYPE_CHECKING:
    import datasets

_STATE = "state.json"
# As the Hub names the files of a split.
_SPLIT_FILE = re.compile(r"(train|test|valid|validation|val|dev|eval)(?![a-z])")
_CHECKED_AT_ONCE = 1024


class HuggingFaceSet:
    """The rows of a data set, as described by HuggingFaceData.

    Images are stored in the rows. Those that only name a file or an address are an error: its content may have changed.

    Attributes:
        images: a number for the image of each row; with `check_images` those of the same bytes are one image.
        digest: of the number of rows, with `check_images` of their images and captions.

    Raises:
        ConfigError: the `datasets` library is not installed.
        DatasetError: there is no such data set, split or column; or listing all rows that cannot be used.
    """

    def __init__(self, config: HuggingFaceData) -> None:
        self.image_size = config.image_size
        self._cropper = Cropper(config)
        self.is_random = self._cropper.varies
        self._where = quote(config.path) + (f", split {quote(config.split)}" if config.split else "")
        self._image, self._caption = config.image_column, config.caption_column
        self._table = _open(config)
        self._sizes: dict[int, Size] = {}
        contents: list[str] = []
        digests: dict[int, bytes] = {}
        problems: list[str] = []
        bad: dict[int, str] = {}
        for row, sample in enumerate(_check_rows(self._table, config) if config.check_images else ()):
            # Five fields, to match the digests in checkpoints; the last two were error messages, whose text may change.
            contents.append(digest_of((sample.captions, sample.size, sample.digest, None, None)))
            if sample.caption_problem:
                problems.append(f"row {row}: {sample.caption_problem}")
            if sample.image_problem:
                bad[row] = f"row {row}: {sample.image_problem}"
            if sample.size is not None:
                self._sizes[row], digests[row] = sample.size, sample.digest
        refuse(self._where, problems, list(bad.values()), skip=config.on_bad_image == "skip")
        self._rows = [row for row in range(len(self._table)) if row not in bad]
        if not self._rows:
            raise DatasetError(f"{self._where} has no row that can be used")
        self.digest = digest_of((len(self._table), *contents))
        numbers: dict[bytes | int, int] = {}
        self.images = [numbers.setdefault(digests.get(row, row), len(numbers)) for row in self._rows]

    def __len__(self) -> int:
        return len(self._rows)

    def bucket(self, index: int) -> Size:
        """Height and width of the views of item `index`."""
        return self._cropper.size_for(self._sizes.get(self._rows[index], (0, 0)))

    def sample(self, index: int, rng: random.Random) -> Sample:
        """The image scaled to cover its rectangle, and cropped; random where the recipe says so.

        Raises:
            DatasetError: the row cannot be used.
        """
        row = self._rows[index]
        fields = self._table[row]
        try:
            image = read_image_bytes(_image_bytes(fields[self._image]), self._image)
            return self._cropper.sample(image, captions_of(fields[self._caption]), rng)
        except InputError as error:
            raise DatasetError(f"{self._where}, row {row}: {error}") from error

    def captions(self) -> list[str]:
        """All captions of each row."""
        column = self._table[self._caption]
        return [text for row in self._rows for text in self._cropper.texts(captions_of(column[row]))]


def survey(config: HuggingFaceData) -> DataSurvey:
    """Read every row of a data set.

    Raises:
        ConfigError: the `datasets` library is not installed.
        DatasetError: there is no such data set, split or column.
    """
    samples: list[UsableSample] = []
    problems: list[str] = []
    for row, sample in enumerate(_check_rows(_open(config), config)):
        found = [problem for problem in (sample.caption_problem, sample.image_problem) if problem]
        problems += [f"row {row}: {problem}" for problem in found]
        if sample.size is not None and not found:
            samples.append(UsableSample(f"row {row}", sample.size, sample.captions))
    if not samples and not problems:
        problems.append("no row")
    return DataSurvey(samples, problems)


def _check_rows(table: datasets.Dataset, config: HuggingFaceData) -> Iterator[CheckedSample]:
    def check(row: int) -> CheckedSample:
        fields = table[row]
        return check_sample(
            config.image_column,
            lambda: _image_bytes(fields[config.image_column]),
            lambda: captions_of(fields[config.caption_column]),
        )

    starts = range(0, len(table), _CHECKED_AT_ONCE)
    for start in tqdm(starts, desc="reading the data set", mininterval=1.0):
        yield from in_threads(check, range(start, min(start + _CHECKED_AT_ONCE, len(table))))


def _image_bytes(value: Any) -> bytes:
    """The content of an image file that a row holds."""
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        path = value.get("path") if isinstance(value, dict) else None
        named = f" but only the name {quote(path)}; save the data set with its images in it" if path else ""
        raise InputError(f"the row holds no image{named}")
    if len(data) > MAX_IMAGE_BYTES:
        raise InputError(f"the image has {len(data):,} bytes; at most {MAX_IMAGE_BYTES:,} are read")
    return data


def _open(config: HuggingFaceData) -> datasets.Dataset:
    """The image column, as the bytes that it stores, and the caption column."""
    path = config.path
    if not path.is_dir():
        raise DatasetError(
            f"{quote(path)} is not a folder; data.path names one on this machine: download a data set of the Hub with "
            "datasets.load_dataset(...).save_to_disk(...)"
        )
    table: Any
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ConfigError(f"data.kind huggingface needs {error.name}: pip install datasets") from None
    try:
        if (path / "dataset_dict.json").is_file():
            path = path / _chosen_split(
                config, sorted(state.parent.name for state in path.glob(f"*/{_STATE}"))
            )
        if (path / _STATE).is_file():
            _check_state(path)
            table = datasets.Dataset.load_from_disk(str(path))
        else:
            table = datasets.Dataset.from_parquet(list(map(str, _parquet_files(config))))
    except LatentgenError:
        raise
    # Whatever parsing of JSON, Arrow and parquet ran into.
    except Exception as error:
        raise DatasetError(f"{quote(path)} cannot be read as a data set: {error}") from error
    columns = {"image_column": config.image_column, "caption_column": config.caption_column}
    if missing := [field for field, column in columns.items() if column not in table.column_names]:
        names = " and ".join(f"data.{field} {quote(columns[field])}" for field in missing)
        raise DatasetError(f"{quote(path)} lacks {names}; its columns are: {', '.join(table.column_names)}")
    table = table.select_columns(list(dict.fromkeys(columns.values())))
    try:
        return table.cast_column(config.image_column, datasets.Image(decode=False))
    except Exception as error:  # pyarrow's errors share no other base
        raise DatasetError(
            f"{quote(path)}, column {quote(config.image_column)} holds no images but "
            f"{table.features[config.image_column]}"
        ) from error


def _check_state(folder: Path) -> None:
    """Refuse a data set that names files outside of its folder."""
    files: Any = read_json(folder / _STATE).get("_data_files")
    if not isinstance(files, list) or not all(isinstance(file, dict) for file in files):
        raise DatasetError(f"{quote(folder / _STATE)} does not list its files; save the data set again")
    for file in files:
        safe_join(folder, file.get("filename"), f"{folder / _STATE}, _data_files")


def _parquet_files(config: HuggingFaceData) -> list[Path]:
    """The parquet files of the split: those named after it, as on the Hub, or all if none is named after any."""
    splits: dict[str, list[Path]] = {}
    for file in sorted(config.path.rglob("*.parquet")):
        match = _SPLIT_FILE.match(file.stem)
        splits.setdefault(match[1] if match else "", []).append(file)
    if not splits:
        raise DatasetError(f"{quote(config.path)} has neither a data set of save_to_disk nor parquet files")
    return splits[_chosen_split(config, sorted(splits))]


def _chosen_split(config: HuggingFaceData, names: list[str]) -> str:
    """The split that the recipe names, or the only one; "" is that of parquet files without a split in their names."""
    if config.split is None and len(names) == 1:
        return names[0]
    if config.split is None or config.split not in names:
        actual = "nothing" if config.split is None else quote(config.split)
        splits = ", ".join(name for name in names if name) or "none"
        raise DatasetError(f"data.split names {actual}; the splits of {quote(config.path)} are: {splits}")
    return config.split
