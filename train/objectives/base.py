"""What is trained: an objective owns its networks, makes batches of samples, and computes the loss."""

from __future__ import annotations

import copy
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, Self

from PIL import Image
from torch import Tensor, nn

from latentgen.checkpoints.weights import save_weights
from latentgen.errors import ConfigError
from latentgen.pipelines.base import Pipeline
from latentgen.train.data import BatchIndices, BucketSampler, CaptionedDataset, Sample, to_tensor


class Subset(NamedTuple):
    """A sum over some samples of a batch, and how many these are, which may be 0."""

    total: Tensor
    count: Tensor


class Loss(NamedTuple):
    """The scalar to minimize, and what else to log: means over the batch, and over subsets of its samples."""

    total: Tensor
    parts: Mapping[str, Tensor]
    subsets: Mapping[str, Subset] = {}


class Example(NamedTuple):
    """A validation image: its caption, what the model gets as input, the image itself, and the mask to inpaint."""

    caption: str
    input: Image.Image
    target: Image.Image
    mask: Image.Image | None = None


class Objective(nn.Module, ABC):
    """A module whose `forward` is the loss of a batch. The parameters that require gradients are trained.

    A subclass needs only `forward`: by default batches are images, and the weights are saved in one file. Its networks
    are its children; one named `text_encoder` may have its own learning rate.

        class Denoiser(Objective):
            def __init__(self, data: CaptionedDataset) -> None:
                super().__init__(data)
                self.network = nn.Conv2d(3, 3, 3, padding=1)

            def forward(self, *batch: Tensor) -> Loss:
                (images,) = batch
                return Loss((self.network(images + 0.1 * torch.randn_like(images)) - images).square().mean(), {})

    `order` has the samples of every step, and the length of an epoch, in which `views` views of each item count as
    samples of their own.
    """

    order: BucketSampler

    def __init__(self, data: CaptionedDataset, *, views: int = 1) -> None:
        super().__init__()
        self._data = data
        self.order = BucketSampler.of(data, views=views)

    def prefetch(self, plan: BatchIndices) -> list[Sample] | None:
        """The views a data loader process reads for `batch`; None if it runs all of `batch`, without an accelerator."""
        return None

    def batch(self, plan: BatchIndices, views: list[Sample] | None = None) -> tuple[Tensor, ...]:
        """The inputs of `forward`: everything that is read or random. They depend only on the plan.

        By default images [B, 3, H, W] in -1..1, float32, from one random view of each sample. `views` are those that
        `prefetch` has returned, if any.
        """
        if views is None:
            rngs = plan.rngs("view")
            views = [self._data.sample(item, rng) for item, rng in zip(plan.items, rngs, strict=True)]
        return (to_tensor([view.image for view in views]),)

    @abstractmethod
    def forward(self, *batch: Tensor) -> Loss:
        """The mean loss of a batch."""

    def save(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write the trained model into an empty folder; by default `weights` as model.safetensors.

        `weights` are the whole state of this module. Training is over, so the objective, on the CPU, may be modified.
        """
        save_weights(dict(weights), folder, "model")

    def pipeline(self) -> Pipeline | None:
        """The pipeline that generates images with the networks as they are; None if there is none."""
        return None

    def for_validation(self, data: CaptionedDataset, seed: int) -> Self:
        """This objective with other images, one view of each, for `validation_loss`; the networks are shared.

        All processes of a run call it. `seed` determines the views.
        """
        other = copy.copy(self)
        other._data, other.order = data, BucketSampler.of(data)
        return other

    def validation_loss(self, plan: BatchIndices, timesteps: int) -> Loss:
        """The mean loss of a batch of validation images, which depends only on the weights and the plan.

        A loss that depends on the noise level is measured at `timesteps` of them; its parts are named after these.
        """
        device = next(self.parameters()).device
        # Not self(...): Accelerate binds the forward of the instance, which for_validation has copied.
        return type(self).forward(self, *(tensor.to(device) for tensor in self.batch(plan)))

    def validation_example(self, view: Sample, rng: random.Random) -> Example:
        """The inputs from which an image-conditioned model is to reproduce this view.

        Raises:
            ConfigError: the model is not conditioned on an image.
        """
        raise ConfigError("validation.images: this task is not conditioned on images; leave it out")


Preflight = Callable[[Objective], None]
"""Raises an error for a recipe that cannot work, before images are generated or encoded, which may take hours.

The objective's networks are those that will be trained, on the CPU; its batches have the right shapes, but no latents.
"""
