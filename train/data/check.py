"""What `latentgen check-data` reports: all problems of a training set, and how it would be trained on."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from latentgen.checkpoints.families import CLIP_PAD, WINDOW, clip_tokenizer
from latentgen.train.config import FolderData, HuggingFaceData, KohyaData, WebDataset
from latentgen.train.data import folder, huggingface, shards
from latentgen.train.data.cropping import Cropper, Size, enlargement
from latentgen.train.data.folder import FolderSurvey, pixels
from latentgen.train.data.sample_checks import DataSurvey, UsableSample


class BucketCount(NamedTuple):
    """The contents of a bucket: the number of images, and of samples per epoch, which counts repeats."""

    images: int
    samples: int


class Report(NamedTuple):
    """The number of usable images and captions; the buckets by size; problems; and notes on what may be unintended."""

    images: int
    captions: int
    buckets: Mapping[Size, BucketCount]
    problems: Sequence[str]
    notes: Sequence[str]


def check(config: FolderData | KohyaData | WebDataset | HuggingFaceData) -> Report:
    """Look at every image of a training set.

    Raises:
        ConfigError: a library is missing.
        DatasetError: there is no such set.
    """
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        if isinstance(config, WebDataset):
            survey = shards.survey(config)
        elif isinstance(config, HuggingFaceData):
            survey = huggingface.survey(config)
        else:
            survey = _data_survey(folder.survey(config))
    # Decompression bombs are not a UserWarning: they are listed as problems.
    messages = (str(warning.message) for warning in warned if warning.category is UserWarning)
    cropper = Cropper(config)
    samples = survey.samples
    sizes = [cropper.size_for(sample.size) for sample in samples]
    images, epoch = Counter(sizes), Counter[Size]()
    for sample, size in zip(samples, sizes, strict=True):
        epoch[size] += sample.repeats
    return Report(
        images=len(samples),
        captions=sum(len(sample.captions) for sample in samples),
        buckets={size: BucketCount(images[size], epoch[size]) for size in sorted(images)},
        problems=survey.problems,
        notes=[*survey.notes, *dict.fromkeys(messages), *_notes(samples, sizes)],
    )


def _data_survey(survey: FolderSurvey) -> DataSurvey:
    listing, facts, bad = survey
    samples = [
        UsableSample(listing.name(item.file), facts[item.file].size, item.captions, item.repeats)
        for item in listing.items
        if item.captions and item not in bad
    ]
    alike: dict[bytes, list[str]] = {}
    for item in listing.items:
        if item.file in facts:
            alike.setdefault(facts[item.file].digest, []).append(listing.name(item.file))
    twins = [f"{first}: the same image as {', '.join(rest)}" for first, *rest in alike.values() if rest]
    return DataSurvey(samples, [*listing.problems, *bad.values()], [*listing.notes, *twins])


def _notes(samples: Sequence[UsableSample], sizes: Sequence[Size]) -> Iterator[str]:
    """Notes on small images, empty captions, and captions that exceed CLIP's window, counted with CLIP's tokenizer."""
    for sample, size in zip(samples, sizes, strict=True):
        scale = enlargement(sample.size, size)
        if scale > 1:
            yield f"{sample.name}: {pixels(sample.size)} is smaller than {pixels(size)}, by {scale:.2f} times"
    yield from (f"{sample.name}: its caption is empty" for sample in samples if "" in sample.captions)
    named = [(sample.name, text) for sample in samples for text in sample.captions]
    if not named:
        return
    room = WINDOW - 2  # for the tokens that begin and end a text
    tokenizer = clip_tokenizer(pad_token=CLIP_PAD)
    rows = tokenizer([text for _, text in named], add_special_tokens=False, verbose=False).input_ids
    for (name, _), row in zip(named, rows, strict=True):
        if len(row) > room:
            yield f"{name}: a caption of {len(row)} tokens is read in several of CLIP's windows of {room}"
