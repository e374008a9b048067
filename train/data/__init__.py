"""Training sets, and the order in which a run sees them."""

from __future__ import annotations

from latentgen.train.config import Data, EmojiData
from latentgen.train.data.plan import BatchPlan as BatchPlan
from latentgen.train.data.plan import item_at as item_at
from latentgen.train.data.plan import plan_step as plan_step
from latentgen.train.data.plan import sample_rng as sample_rng
from latentgen.train.data.views import CaptionedImages as CaptionedImages
from latentgen.train.data.views import Captions as Captions
from latentgen.train.data.views import View as View
from latentgen.train.data.views import to_tensor as to_tensor


def open_data(config: Data) -> CaptionedImages:
    """The data set that a recipe names.

    Raises:
        DatasetError: listing all that is wrong with it.
    """
    if isinstance(config, EmojiData):
        from latentgen.train.data.emoji import EmojiSet

        return EmojiSet(image_size=config.image_size, held_out=config.held_out)
    from latentgen.train.data.folder import ImageFolder

    return ImageFolder(config)
