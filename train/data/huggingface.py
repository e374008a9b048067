"""Training sets that the `datasets` library has written to disk, or parquet files; nothing reaches the network."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tqdm import tqdm

from latentgen.errors import ConfigError, DatasetError, InputError, LatentgenError
from latentgen.files import quote, read_json, safe_join
from latentgen.image_file import read_image_bytes
from latentgen.train.config import HuggingFaceData
from latentgen.train.data import Sample, digest_of
from latentgen.train.data.archive import (
    MAX_IMAGE_BYTES,
    ArchiveSample,
    ArchiveSurvey,
    captions_of,
    image_size,
    leave_out,
    refuse,
)
from latentgen.train.data.cropping import Cropper, Size
from latentgen.train.data.image_checks import in_threads

if TYPE_CHECKING:
    import datasets

_STATE = "state.json"
# As the Hub names the files of a split.
_SPLIT_FILE = re.compile(r"(train|test|valid|validation|val|dev|eval)(?![a-z])")
_CHECKED_AT_ONCE = 1024


class HuggingFaceSet:
    """The rows of a data set; see HuggingFaceData for which.

    Images are the bytes that the rows hold. Those that only name a file or an address are refused: what is there may
    have changed, and fetching it is for the one who made the data set.

    Attributes:
        image_size: the side of the views.
        is_random: whether two views of a row can differ.
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
        self._sizes: dict[int, Size] = {}
        self._digests: dict[int, bytes] = {}
        self._contents: list[str] = []
        self._where = quote(config.path) + (f", split {quote(config.split)}" if config.split else "")
        self._image, self._caption = config.image_column, config.caption_column
        self._table = _with_columns(_open(config), config)
        self._rows: range | list[int] = range(len(self._table))
        if config.check_images:
            captions, images = self._check(config)
            if config.on_bad_image == "skip":
                leave_out(list(images.values()))
                self._rows = [row for row in self._rows if row not in images]
            else:
                captions += images.values()
            refuse(self._where, captions)
        if not self._rows:
            raise DatasetError(f"{self._where} has no row that can be used")
        self.digest = digest_of((len(self._table), *self._contents))
        numbers: dict[bytes | int, int] = {}
        self.images = [numbers.setdefault(self._digests.get(row, row), len(numbers)) for row in self._rows]

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
            return self._cropper.sample(image, self._cropper.texts(captions_of(fields[self._caption])), rng)
        except InputError as error:
            raise DatasetError(f"{self._where}, row {row}: {error}") from error

    def captions(self) -> list[str]:
        """All captions of each row."""
        column = self._table[self._caption]
        return [text for row in self._rows for text in self._cropper.texts(captions_of(column[row]))]

    def _check(self, config: HuggingFaceData) -> tuple[list[str], dict[int, str]]:
        """The problems of captions, and those of images by row."""
        captions: list[str] = []
        images: dict[int, str] = {}
        for row, found in enumerate(_read_rows(self._table, config)):
            self._contents.append(digest_of(found))
            if found.caption_problem:
                captions.append(f"row {row}: {found.caption_problem}")
            if found.image_problem:
                images[row] = f"row {row}: {found.image_problem}"
            if found.size is not None:
                self._sizes[row], self._digests[row] = found.size, found.digest
        return captions, images


def survey(config: HuggingFaceData) -> ArchiveSurvey:
    """Read every row of a data set.

    Raises:
        ConfigError: the `datasets` library is not installed.
        DatasetError: there is no such data set, split or column.
    """
    samples: list[ArchiveSample] = []
    problems: list[str] = []
    for row, found in enumerate(_read_rows(_with_columns(_open(config), config), config)):
        wrong = [problem for problem in (found.caption_problem, found.image_problem) if problem]
        problems += [f"row {row}: {problem}" for problem in wrong]
        if found.size is not None and not wrong:
            samples.append(ArchiveSample(f"row {row}", found.size, found.captions))
    if not samples and not problems:
        problems.append("no row")
    return ArchiveSurvey(samples, problems)


class _Row(NamedTuple):
    captions: tuple[str, ...] = ()
    size: Size | None = None
    digest: bytes = b""
    caption_problem: str | None = None
    image_problem: str | None = None


def _read_rows(table: datasets.Dataset, config: HuggingFaceData) -> Iterator[_Row]:
    """The content of each row, with its image decoded."""

    def read(row: int) -> _Row:
        fields, found = table[row], _Row()
        try:
            found = found._replace(captions=captions_of(fields[config.caption_column]))
        except InputError as error:
            found = found._replace(caption_problem=str(error))
        try:
            image = _image_bytes(fields[config.image_column])
            size = image_size(image, config.image_column)
            return found._replace(size=size, digest=hashlib.sha256(image).digest())
        except InputError as error:
            return found._replace(image_problem=str(error))

    starts = range(0, len(table), _CHECKED_AT_ONCE)
    for start in tqdm(starts, desc="reading the data set", mininterval=1.0):
        yield from in_threads(read, range(start, min(start + _CHECKED_AT_ONCE, len(table))))


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
    path = config.path
    if not path.is_dir():
        raise DatasetError(
            f"{quote(path)} is not a folder; data.path names one on this machine: download a data set of the Hub with "
            "datasets.load_dataset(...).save_to_disk(...)"
        )
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"data.kind huggingface needs the module {error.name}: pip install datasets"
        ) from None
    try:
        if (path / "dataset_dict.json").is_file():
            names = sorted(child.name for child in path.iterdir() if (child / _STATE).is_file())
            path = path / _chosen(config, names)
        if (path / _STATE).is_file():
            _check_state(path)
            return datasets.Dataset.load_from_disk(str(path))
        files = _parquet_files(config)
        table: Any = datasets.Dataset.from_parquet([str(file) for file in files])
        return table
    except LatentgenError:
        raise
    # Whatever parsing of JSON, Arrow and parquet ran into.
    except Exception as error:
        raise DatasetError(f"{quote(path)} cannot be read as a data set: {error}") from error


def _check_state(folder: Path) -> None:
    """Refuse a data set that names files outside of its folder."""
    files: Any = read_json(folder / _STATE).get("_data_files")
    if not isinstance(files, list) or not all(isinstance(file, dict) for file in files):
        raise DatasetError(f"{quote(folder / _STATE)} does not list its files; save the data set again")
    for file in files:
        safe_join(folder, file.get("filename"), f"{folder / _STATE}, _data_files")


def _parquet_files(config: HuggingFaceData) -> list[Path]:
    """The parquet files of the split: those named after it, as on the Hub, or all if none is named after any."""
    files = sorted(config.path.rglob("*.parquet"))
    if not files:
        raise DatasetError(
            f"{quote(config.path)} holds neither a data set made by save_to_disk nor parquet files"
        )
    splits: dict[str, list[Path]] = {}
    for file in files:
        match = _SPLIT_FILE.match(file.stem)
        splits.setdefault(match[1] if match else "", []).append(file)
    if set(splits) == {""} and config.split is None:
        return files
    return splits[_chosen(config, sorted(splits))]


def _chosen(config: HuggingFaceData, names: list[str]) -> str:
    """The split that the recipe names, or the only one."""
    named = [name for name in names if name]
    if config.split is None and len(names) == 1:
        return names[0]
    if config.split is None or config.split not in names:
        found = "nothing" if config.split is None else quote(config.split)
        raise DatasetError(
            f"data.split names {found}; the splits of {quote(config.path)} are: {', '.join(named) or 'none'}"
        )
    return config.split


def _with_columns(table: datasets.Dataset, config: HuggingFaceData) -> datasets.Dataset:
    """The two columns, images as the bytes that they are stored as."""
    from datasets import Image

    names = (config.image_column, config.caption_column)
    fields = ("image_column", "caption_column")
    if missing := [
        f"data.{field} {quote(name)}"
        for field, name in zip(fields, names, strict=True)
        if name not in table.column_names
    ]:
        raise DatasetError(
            f"{quote(config.path)} lacks {' and '.join(missing)}; its columns are: {', '.join(table.column_names)}"
        )
    table = table.select_columns(list(dict.fromkeys(names)))
    try:
        return table.cast_column(config.image_column, Image(decode=False))
    except Exception as error:  # pyarrow's errors share no other base
        raise DatasetError(
            f"{quote(config.path)}, column {quote(config.image_column)} holds no images but "
            f"{table.features[config.image_column]}"
        ) from error
