"""What is learnt: each objective owns its networks, turns samples into a batch, computes the loss, and saves."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from PIL import Image
from torch import Tensor, nn

from latentgen.errors import ConfigError
from latentgen.models.activation_checkpointing import Checkpointing
from latentgen.models.config import StorageDtype
from latentgen.pipelines.base import Pipeline
from latentgen.train.data import BatchIndices, BucketSampler, CaptionedDataset, Sample


class Subset(NamedTuple):
    """The sum of something over those samples of a batch that it is told of, and their number, which may be 0."""

    total: Tensor
    count: Tensor


class Loss(NamedTuple):
    """The scalar to minimise, and what to show of it: other means over the batch, and over subsets of its samples."""

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
    """A module whose `forward` computes the loss; its trainable parameters are those that require gradients."""

    order: BucketSampler
    """Which items each step shows; its length is how many one epoch shows."""

    memory_format: torch.memory_format = torch.channels_last
    """How the kernels of the convolutions lie in memory during training."""

    @abstractmethod
    def batch(self, plan: BatchIndices) -> tuple[Tensor, ...]:
        """Everything random or read from the data, as tensors: a function of the plan alone."""

    def draw(self, plan: BatchIndices) -> Any:
        """What a process that prepares batches does of `batch`: all of it, or what comes before the networks, which
        belong to the process that trains."""
        return self.batch(plan)

    def finish(self, plan: BatchIndices, drawn: Any) -> tuple[Tensor, ...]:
        """The rest of `batch`, from what `draw` gave."""
        return drawn

    @abstractmethod
    def forward(self, *batch: Tensor) -> Loss:
        """The mean loss of the batch."""

    @abstractmethod
    def compile_networks(self) -> None:
        """Let torch.compile fuse the networks that take the time; the names of their weights stay."""

    def checkpointed_layers(self) -> Iterable[nn.Module]:
        """The layers of which `checkpoint_gradients` keeps the inputs alone; none nests in another."""
        return ()

    def checkpoint_gradients(self, how: Checkpointing) -> None:
        """Keep the inputs of the networks' layers, and compute the rest once more in the backward pass, or some of it.

        Raises:
            ConfigError: the networks cannot.
        """
        raise ConfigError("memory.gradient_checkpointing: the networks of this task cannot; leave it out")

    def text_parameters(self) -> Iterable[nn.Parameter]:
        """The parameters of text encoders, which may have a learning rate of their own."""
        return ()

    def store_base(self, storage: StorageDtype) -> None:
        """Store what is not trained in fewer bits.

        Raises:
            ConfigError: as `check_base_storage`.
        """
        self.check_base_storage(storage)

    def check_base_storage(self, storage: StorageDtype) -> None:
        """Refuse to store what is not trained in fewer bits, where that cannot be.

        Raises:
            ConfigError: it is saved with the model, and must stay as it is.
        """
        raise ConfigError(
            f"memory.base_dtype is {storage}, but this task saves all weights, which must stay as they are; leave it "
            "out, or train adapters"
        )

    def save_assets(self, folder: Path) -> None:
        """Write what a resumed run must find as it was, besides the weights, into the run's folder."""

    def over(self, data: CaptionedDataset, seed: int) -> Self:
        """This objective over other images, one view of each, for `held_out_loss`; the networks are shared.

        Called in all processes of a run, which share the encoding where there is a cache on disk.

        Raises:
            ConfigError: the task has no such loss.
        """
        raise ConfigError(
            "validation: this task measures no loss on held-out images; leave data and validation_fraction out"
        )

    def held_out_loss(self, plan: BatchIndices, timesteps: int) -> Loss:
        """The mean loss of a batch of what was given to `over`, a function of the weights and the plan alone.

        Args:
            plan: the batch.
            timesteps: how many noise levels a loss that depends on one is measured at; its parts are named after them.
        """
        device = next(self.parameters()).device
        # Not through the instance, whose forward Accelerate may have bound to another object.
        return type(self).forward(self, *(tensor.to(device) for tensor in self.batch(plan)))

    def preview(self, weights: Mapping[str, Tensor]) -> AbstractContextManager[Pipeline]:
        """A pipeline that draws with `weights` in the place of the trained ones; training goes on afterwards as if it
        had never been.

        Raises:
            ConfigError: the task trains nothing that draws.
        """
        raise ConfigError("validation: this task trains nothing that draws; leave prompts and images out")

    @property
    def remakes(self) -> bool:
        """Whether the model makes images out of images, which `example` then shows it, and draws none from a prompt."""
        return False

    def example(self, view: Sample, rng: random.Random) -> Example:
        """What a model that makes images out of images is shown, and told, where it is to make this one.

        Raises:
            ConfigError: it is shown nothing.
        """
        return Example(view.captions.draw(rng), self.shown(view, rng), view.image)

    def shown(self, view: Sample, rng: random.Random) -> Image.Image:
        """What a model that makes images out of images is shown where it is to make this one.

        Raises:
            ConfigError: it is shown nothing.
        """
        raise ConfigError("validation.images: this task makes no image out of another; leave it out")

    @property
    def adapts(self) -> Pipeline | None:
        """The pipeline whose model is taught something that `save` writes without it; None for a whole model."""
        return None

    @abstractmethod
    def save(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write the finished model in the diffusers layout, with `weights` for the whole state of this module.

        Training is over: the objective, which must be on the CPU, may change itself.
        """


Check = Callable[[Objective], None]
"""Refuses an objective, by raising an error, before it does what takes long: drawing and encoding images.

Its networks are those that will be trained, on the CPU; a batch has its shapes, and no true latents.
"""


def unchecked(_: Objective) -> None:
    """Refuse nothing."""
