"""A training set of the user's own: a folder of images with their captions."""

from __future__ import annotations

import random
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from latentgen.errors import DatasetError
from latentgen.files import quote
from latentgen.image_file import read_image
from latentgen.train.config import FolderData, KohyaData
from latentgen.train.data import Sample, digest_of
from latentgen.train.data.cropping import Cropper, Size, enlargement
from latentgen.train.data.image_checks import ImageFacts, examine
from latentgen.train.data.scan import Item, Listing, list_folder


class Survey(NamedTuple):
    """The content of a folder, and which of its images can be used.

    Attributes:
        listing: its items.
        facts: the facts of every readable image.
        bad: the problems of items whose images cannot be used.
    """

    listing: Listing
    facts: Mapping[Path, ImageFacts]
    bad: Mapping[Item, str]


def survey(config: FolderData | KohyaData) -> Survey:
    """List a folder and decode all of its images once.

    Raises:
        DatasetError: there is no such folder.
    """
    listing = list_folder(config)
    files = sorted({file for item in listing.items for file in item.files})
    facts, problems = examine(files)
    bad: dict[Item, str] = {}
    for item in listing.items:
        found = [problems[file] for file in item.files if file in problems]
        if not found:
            found = [
                f"{listing.name(file)} is {pixels(facts[file].size)}, and {listing.name(item.file)} is "
                f"{pixels(facts[item.file].size)}; both must be of one size"
                for file in item.files
                if facts[file].size != facts[item.file].size
            ]
        if found:
            bad[item] = "; ".join(found)
    return Survey(listing, facts, bad)


def _digest_fields(item: Item, listing: Listing, facts: Mapping[Path, ImageFacts]) -> tuple[object, ...]:
    """Everything in an item that training uses."""
    mask, before = (None if file is None else facts[file].digest for file in (item.mask, item.before))
    return (listing.name(item.file), facts[item.file].digest, mask, before, item.captions, item.repeats)


def pixels(size: Size) -> str:
    """A size for a message, width first, as in image viewers."""
    return f"{size[1]}x{size[0]}"


class ImageFolder:
    """A folder of images, as described by FolderData and KohyaData.

    Every file is decoded once at the start. Bad images are an error, or left out with a warning if the recipe says
    so; they are never replaced. An image that an epoch shows several times is as many items.

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
        for columns in listing.unread:
            warnings.warn(columns, stacklevel=2)
        problems = list(listing.problems)
        if config.on_bad_image == "skip" and bad:
            warnings.warn(f"{len(bad)} images are left out: {'; '.join(bad.values())}", stacklevel=2)
        else:
            problems += bad.values()
        good = [item for item in listing.items if item not in bad]
        if not good and not problems:
            problems.append("no image that can be used")
        if problems:
            raise DatasetError(
                f"{quote(config.path)} has {len(problems)} problems: {'; '.join(problems)}; "
                "`latentgen check-data` lists them one a line"
            )
        self._items = [item for item in good for _ in range(item.repeats)]
        self.digest = digest_of(_digest_fields(item, listing, facts) for item in good)
        numbers: dict[bytes, int] = {}
        self.images = [numbers.setdefault(facts[item.file].digest, len(numbers)) for item in self._items]
        self._sizes = [self._cropper.size_for(facts[item.file].size) for item in self._items]
        small = sum(
            enlargement(facts[item.file].size, self._cropper.size_for(facts[item.file].size)) > 1
            for item in good
        )
        if small:
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
        return [text for item in self._items for text in item.captions]
