"""Training sets of images and captions in a folder."""

from __future__ import annotations

import hashlib
import random
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from latentgen.errors import DatasetError, InputError
from latentgen.files import quote, wrong_content
from latentgen.image_file import read_image
from latentgen.train.config import FolderData, KohyaData
from latentgen.train.data import Sample, digest_of
from latentgen.train.data.cropping import Cropper, Size, enlargement
from latentgen.train.data.sample_checks import in_threads, refuse
from latentgen.train.data.scan import Item, Listing, list_folder

_HEAD_BYTES = 512


class ImageFacts(NamedTuple):
    """Height and width of an upright image, and the digest of its file."""

    size: Size
    digest: bytes


class FolderSurvey(NamedTuple):
    """The items of a folder, facts of every readable image, and problems of items whose images cannot be used."""

    listing: Listing
    facts: Mapping[Path, ImageFacts]
    bad: Mapping[Item, str]


def survey(config: FolderData | KohyaData) -> FolderSurvey:
    """List a folder and decode all of its images once.

    Raises:
        DatasetError: there is no such folder.
    """
    listing = list_folder(config)
    files = sorted({file for item in listing.items for file in item.files})
    facts, problems = examine(files)
    bad: dict[Item, str] = {}
    for item in listing.items:
        found = [problems[file] for file in item.files if file in problems] or [
            f"{listing.name(file)} is {pixels(facts[file].size)}, and {listing.name(item.file)} is "
            f"{pixels(facts[item.file].size)}; both must be of one size"
            for file in item.files
            if facts[file].size != facts[item.file].size
        ]
        if found:
            bad[item] = "; ".join(found)
    return FolderSurvey(listing, facts, bad)


def examine(files: Sequence[Path]) -> tuple[Mapping[Path, ImageFacts], Mapping[Path, str]]:
    """Decode all files: the facts of those that can be read, and the problems of the others."""
    found = dict(zip(files, in_threads(_examine, files, title="reading the images"), strict=True))
    facts = {file: result for file, result in found.items() if not isinstance(result, str)}
    return facts, {file: result for file, result in found.items() if isinstance(result, str)}


def _examine(file: Path) -> ImageFacts | str:
    try:
        with file.open("rb") as stream:
            if problem := wrong_content(stream.read(_HEAD_BYTES)):
                return f"{quote(file)} is {problem}; replace or remove it"
            stream.seek(0)
            digest = hashlib.file_digest(stream, "sha256").digest()
        image = read_image(file)
    except OSError as error:
        return f"{quote(file)} cannot be read: {error.strerror or error}"
    except InputError as error:
        return str(error)
    return ImageFacts((image.height, image.width), digest)


def pixels(size: Size) -> str:
    """A size for a message, width first, as in image viewers."""
    return f"{size[1]}x{size[0]}"


class ImageFolder:
    """A folder of images, as described by FolderData and KohyaData.

    Every file is decoded once at the start. Bad images are an error, or left out with a warning if the recipe says
    so; they are never replaced. An image that is repeated n times is n items.

    Attributes:
        images: a number for the image of each item; files of the same bytes are one image.
        digest: of all image files, their names, their captions and their repeats.

    Raises:
        DatasetError: listing every image that has no caption or cannot be read, and every row without its image.
    """

    def __init__(self, config: FolderData | KohyaData) -> None:
        self.image_size = config.image_size
        self._cropper = Cropper(config)
        self.is_random = self._cropper.varies
        listing, facts, bad = survey(config)
        where, skip = quote(config.path), config.on_bad_image == "skip"
        refuse(where, listing.problems, list(bad.values()), skip=skip)
        good = [item for item in listing.items if item not in bad]
        if not good:
            raise DatasetError(f"{where} has no image that can be used")
        self._items = [item for item in good for _ in range(item.repeats)]
        self._sizes = [self._cropper.size_for(facts[item.file].size) for item in self._items]
        numbers: dict[bytes, int] = {}
        digests = {file: facts[file].digest for file in facts}
        self.images = [numbers.setdefault(digests[item.file], len(numbers)) for item in self._items]
        self.digest = digest_of(
            (
                listing.name(item.file),
                *(digests[item.file], item.mask and digests[item.mask], item.before and digests[item.before]),
                *(self._cropper.texts(item.captions), item.repeats),
            )
            for item in good
        )
        sizes = [facts[item.file].size for item in good]
        if small := sum(enlargement(size, self._cropper.size_for(size)) > 1 for size in sizes):
            warnings.warn(
                f"{small} of {len(good)} images are smaller than their views and are enlarged; "
                "`latentgen check-data` names them",
                stacklevel=2,
            )

    def __len__(self) -> int:
        return len(self._items)

    def bucket(self, index: int) -> Size:
        """Height and width of the item's views: the bucket of the nearest aspect ratio."""
        return self._sizes[index]

    def sample(self, index: int, rng: random.Random) -> Sample:
        """The image scaled to cover its rectangle, and cropped; random where the recipe says so."""
        item = self._items[index]
        mask, before = (None if file is None else read_image(file) for file in (item.mask, item.before))
        return self._cropper.sample(read_image(item.file), item.captions, rng, mask=mask, before=before)

    def captions(self) -> list[str]:
        """All captions of each image."""
        return [text for item in self._items for text in self._cropper.texts(item.captions)]
