"""What `latentgen check-data` reports: all that is wrong with a training set, and how it would be trained on."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from latentgen.checkpoints.families import CLIP_PAD, WINDOW, clip_tokenizer
from latentgen.train.config import FolderData, HuggingFaceData, ImageData, KohyaData, WebDataset
from latentgen.train.data import folder, huggingface, shards
from latentgen.train.data.cropping import Cropper, Size, enlargement
from latentgen.train.data.folder import pixels
from latentgen.train.data.image_checks import ImageFacts
from latentgen.train.data.scan import Listing


class BucketCount(NamedTuple):
    """How much of a set goes to one bucket: images, and samples of an epoch, which repeats make more."""

    images: int
    samples: int


class Report(NamedTuple):
    """The content of a training set.

    Attributes:
        images: how many can be used.
        captions: of these images.
        buckets: by height and width; in order.
        problems: what training refuses.
        notes: what it takes, and may not be as it was meant.
    """

    images: int
    captions: int
    buckets: Mapping[Size, BucketCount]
    problems: Sequence[str]
    notes: Sequence[str]


class _Usable(NamedTuple):
    """An image that can be trained on: its name, height and width, captions, and how often an epoch shows it."""

    name: str
    size: Size
    captions: tuple[str, ...]
    repeats: int = 1


def check(config: FolderData | KohyaData | WebDataset | HuggingFaceData) -> Report:
    """Look at every image of a training set.

    Raises:
        ConfigError: a library is missing.
        DatasetError: there is no such set.
    """
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        if isinstance(config, WebDataset):
            packed = shards.survey(config)
        elif isinstance(config, HuggingFaceData):
            packed = huggingface.survey(config)
        else:
            return _of_folder(config, warned)
    good = [_Usable(*sample) for sample in packed.samples]
    return _report(config, good, packed.problems, _messages(warned))


def _of_folder(config: FolderData | KohyaData, warned: Sequence[warnings.WarningMessage]) -> Report:
    listing, facts, bad = folder.survey(config)
    good = [
        _Usable(listing.name(item.file), facts[item.file].size, item.captions, item.repeats)
        for item in listing.items
        if item.captions and item not in bad
    ]
    notes = [*listing.notes, *listing.unread, *_duplicates(listing, facts), *_messages(warned)]
    return _report(config, good, [*listing.problems, *bad.values()], notes)


def _report(
    config: ImageData, good: Sequence[_Usable], problems: Sequence[str], notes: Sequence[str]
) -> Report:
    cropper = Cropper(config)
    sizes = [cropper.size_for(image.size) for image in good]
    images, samples = Counter(sizes), Counter[Size]()
    for image, size in zip(good, sizes, strict=True):
        samples[size] += image.repeats
    return Report(
        images=len(good),
        captions=sum(len(image.captions) for image in good),
        buckets={size: BucketCount(images[size], samples[size]) for size in sorted(images)},
        problems=problems,
        notes=[*notes, *_small(good, sizes), *_empty(good), *_long(good)],
    )


def _messages(warned: Sequence[warnings.WarningMessage]) -> list[str]:
    """Warnings such as an animated image. Decompression bombs are no UserWarning: they are listed as problems."""
    return list(dict.fromkeys(str(warning.message) for warning in warned if warning.category is UserWarning))


def _duplicates(listing: Listing, facts: Mapping[Path, ImageFacts]) -> Iterator[str]:
    """Images of the same bytes; a mask or an image before an edit may serve many."""
    alike: dict[bytes, list[str]] = {}
    for item in listing.items:
        if item.file in facts:
            alike.setdefault(facts[item.file].digest, []).append(listing.name(item.file))
    for names in alike.values():
        if len(names) > 1:
            yield f"{names[0]}: the same image as {', '.join(names[1:])}"


def _small(images: Sequence[_Usable], sizes: Sequence[Size]) -> Iterator[str]:
    for image, size in zip(images, sizes, strict=True):
        scale = enlargement(image.size, size)
        if scale > 1:
            yield (
                f"{image.name}: {pixels(image.size)} is smaller than its view of {pixels(size)}; it would be enlarged "
                f"to {scale:.2f} times its size"
            )


def _empty(images: Sequence[_Usable]) -> Iterator[str]:
    for image in images:
        if "" in image.captions:
            yield f"{image.name}: its caption is empty"


def _long(images: Sequence[_Usable]) -> Iterator[str]:
    """Captions beyond CLIP's window, with whose tokenizer the tokens are counted."""
    owners = [image for image in images for _ in image.captions]
    texts = [text for image in images for text in image.captions]
    if not texts:
        return
    tokenizer = clip_tokenizer(pad_token=CLIP_PAD)
    room = WINDOW - 2  # for the tokens that begin and end a text
    rows = tokenizer(texts, add_special_tokens=False, verbose=False).input_ids
    for image, row in zip(owners, rows, strict=True):
        if len(row) > room:
            yield (
                f"{image.name}: a caption of {len(row)} tokens, of which CLIP's window holds {room}; it is read in "
                "several windows"
            )
