"""Training sets, and the order in which a run sees them."""

from __future__ import annotations

from typing import NamedTuple

from latentgen.train.config import Data, EmojiData, HuggingFaceData, TrainConfig, WebDataset
from latentgen.train.data.dataset import CaptionedDataset as CaptionedDataset
from latentgen.train.data.dataset import Captions as Captions
from latentgen.train.data.dataset import Sample as Sample
from latentgen.train.data.dataset import Subset as Subset
from latentgen.train.data.dataset import TrainingSet as TrainingSet
from latentgen.train.data.dataset import check_sides as check_sides
from latentgen.train.data.dataset import digest_of as digest_of
from latentgen.train.data.dataset import split as split
from latentgen.train.data.dataset import to_tensor as to_tensor
from latentgen.train.data.dataset import unique_items
from latentgen.train.data.sampler import BatchIndices as BatchIndices
from latentgen.train.data.sampler import BucketSampler as BucketSampler
from latentgen.train.data.sampler import plan_step as plan_step
from latentgen.train.data.sampler import sample_rng as sample_rng


class Splits(NamedTuple):
    """The images to train on, those to validate on, if any, and the digest of the recipe's `data`."""

    training: CaptionedDataset
    validation: CaptionedDataset | None
    digest: str


def open_splits(config: TrainConfig) -> Splits:
    """The data sets of a recipe: its `data`, and the `validation_fraction` of it or `validation.data`.

    The validation images depend only on the number of images.

    Raises:
        DatasetError: listing all errors of a data set.
    """
    data = open_data(config.data)
    training: CaptionedDataset = data
    held_out: CaptionedDataset | None = None
    validation = config.validation
    if config.validation_fraction:
        training, held_out = split(data, config.validation_fraction)
    elif validation is not None and validation.data is not None:
        other = open_data(validation.data)
        held_out = Subset(other, unique_items(other))
    if validation is not None and held_out is not None:
        held_out = Subset(held_out, range(min(validation.loss_images, len(held_out))))
    return Splits(training, held_out, data.digest)


def open_data(config: Data) -> TrainingSet:
    """The data set of a recipe's section.

    Raises:
        DatasetError: listing all of its errors.
    """
    if isinstance(config, EmojiData):
        from latentgen.train.data.emoji import EmojiSet

        return EmojiSet(image_size=config.image_size, held_out=config.held_out)
    if isinstance(config, WebDataset):
        from latentgen.train.data.shards import ShardSet

        return ShardSet(config)
    if isinstance(config, HuggingFaceData):
        from latentgen.train.data.huggingface import HuggingFaceSet

        return HuggingFaceSet(config)
    from latentgen.train.data.folder import ImageFolder

    return ImageFolder(config)
