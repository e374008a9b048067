"""Training sets, and the order in which a run sees them."""

from __future__ import annotations

from latentgen.train.config import Data, EmojiData, HuggingFaceData, WebDataset
from latentgen.train.data.order import Order as Order
from latentgen.train.data.order import item_at as item_at
from latentgen.train.data.order import sample_rng as sample_rng
from latentgen.train.data.plan import BatchPlan as BatchPlan
from latentgen.train.data.plan import plan_step as plan_step
from latentgen.train.data.views import CaptionedImages as CaptionedImages
from latentgen.train.data.views import Captions as Captions
from latentgen.train.data.views import TrainingSet as TrainingSet
from latentgen.train.data.views import View as View
from latentgen.train.data.views import check_sides as check_sides
from latentgen.train.data.views import digest_of as digest_of
from latentgen.train.data.views import to_tensor as to_tensor


def open_data(config: Data) -> TrainingSet:
    """The data set that a recipe names.

    Raises:
        DatasetError: listing all that is wrong with it.
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
