"""What `latentgen check-data` reports: all that is wrong with a folder of images, and how it would be trained on."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from latentgen.checkpoints.clip_tokenizer import CLIP_PAD, WINDOW, clip_tokenizer
from latentgen.train.config import FolderData, KohyaData
from latentgen.train.data.examination import ImageFacts
from latentgen.train.data.folder import pixels, survey
from latentgen.train.data.framing import Framing, Size, enlargement
from latentgen.train.data.listing import Item, Listing


class BucketCount(NamedTuple):
    """How much of a set goes to one bucket: images, and samples of an epoch, which repeats make more."""

    images: int
    samples: int


class Report(NamedTuple):
    """What is in a folder.

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


def check(config: FolderData | KohyaData) -> Report:
    """Look at every file of a training set.

    Raises:
        DatasetError: there is no such folder.
    """
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        listing, facts, bad = survey(config)
    good = [item for item in listing.items if item.captions and item not in bad]
    sizes = {item: Framing(config).size_for(facts[item.file].size) for item in good}
    images, samples = Counter(sizes.values()), Counter[Size]()
    for item, size in sizes.items():
        samples[size] += item.repeats
    notes = [
        *listing.notes,
        *_duplicates(listing, facts),
        # That an image is animated, for instance. A warning of a decompression bomb is no UserWarning: it is a problem.
        *dict.fromkeys(str(warning.message) for warning in warned if warning.category is UserWarning),
        *_small(listing, facts, sizes),
        *_empty(listing, good),
        *_long(listing, good),
    ]
    return Report(
        images=len(good),
        captions=sum(len(item.captions) for item in good),
        buckets={size: BucketCount(images[size], samples[size]) for size in sorted(images)},
        problems=[*listing.problems, *bad.values()],
        notes=notes,
    )


def _duplicates(listing: Listing, facts: Mapping[Path, ImageFacts]) -> Iterator[str]:
    """Images of the same bytes; a mask or an image before an edit may serve many."""
    alike: dict[bytes, list[str]] = {}
    for item in listing.items:
        if item.file in facts:
            alike.setdefault(facts[item.file].digest, []).append(listing.name(item.file))
    for names in alike.values():
        if len(names) > 1:
            yield f"{names[0]}: the same image as {', '.join(names[1:])}"


def _small(listing: Listing, facts: Mapping[Path, ImageFacts], sizes: Mapping[Item, Size]) -> Iterator[str]:
    for item, size in sizes.items():
        original = facts[item.file].size
        scale = enlargement(original, size)
        if scale > 1:
            yield (
                f"{listing.name(item.file)}: {pixels(original)} is smaller than its view of {pixels(size)}; it would "
                f"be enlarged to {scale:.2f} times its size"
            )


def _empty(listing: Listing, items: Sequence[Item]) -> Iterator[str]:
    for item in items:
        if "" in item.captions:
            yield f"{listing.name(item.file)}: its caption is empty"


def _long(listing: Listing, items: Sequence[Item]) -> Iterator[str]:
    """Captions beyond CLIP's window, with whose tokenizer the tokens are counted."""
    owners = [item for item in items for _ in item.captions]
    texts = [text for item in items for text in item.captions]
    if not texts:
        return
    tokenizer = clip_tokenizer(pad_token=CLIP_PAD)
    room = WINDOW - 2  # for the tokens that begin and end a text
    rows = tokenizer(texts, add_special_tokens=False, verbose=False).input_ids
    for item, row in zip(owners, rows, strict=True):
        if len(row) > room:
            yield (
                f"{listing.name(item.file)}: a caption of {len(row)} tokens, of which CLIP's window holds {room}; it "
                "is read in several windows"
            )
