"""What is learnt: each objective owns its networks, turns samples into a batch, computes the loss, and saves."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from latentgen.errors import ConfigError
from latentgen.models.config import StorageDtype
from latentgen.train.data import BatchPlan, Order


class Loss(NamedTuple):
    """The scalar to minimise, and what to show of it."""

    total: Tensor
    parts: Mapping[str, Tensor]


class Objective(nn.Module, ABC):
    """A module whose `forward` computes the loss; its trainable parameters are those that require gradients."""

    item_count: int
    """How many items one epoch shows."""

    order: Order
    """In which order they are shown."""

    memory_format: torch.memory_format = torch.channels_last
    """How the kernels of the convolutions lie in memory during training."""

    @abstractmethod
    def batch(self, plan: BatchPlan) -> tuple[Tensor, ...]:
        """Everything random or read from the data, as tensors: a function of the plan alone."""

    @abstractmethod
    def forward(self, *batch: Tensor) -> Loss:
        """The mean loss of the batch."""

    @abstractmethod
    def compile_networks(self) -> None:
        """Let torch.compile fuse the networks that take the time; the names of their weights stay."""

    def checkpointed_layers(self) -> Iterable[nn.Module]:
        """The layers of which `checkpoint_gradients` keeps the inputs alone; none nests in another."""
        return ()

    def checkpoint_gradients(self) -> None:
        """Keep the inputs of the networks' layers, and compute the rest once more in the backward pass.

        Raises:
            ConfigError: the networks cannot.
        """
        raise ConfigError("memory.gradient_checkpointing: the networks of this task cannot; leave it out")

    def store_base(self, storage: StorageDtype) -> None:
        """Store what is not trained in fewer bits.

        Raises:
            ConfigError: it is saved with the model, and must stay as it is.
        """
        raise ConfigError(
            f"memory.base_dtype is {storage}, but this task saves all weights, which must stay as they are; leave it "
            "out, or train adapters"
        )

    def save_assets(self, folder: Path) -> None:
        """Write what a resumed run must find as it was, besides the weights, into the run's folder."""

    @abstractmethod
    def save(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write the finished model in the diffusers layout, with `weights` for the whole state of this module.

        Training is over: the objective, which must be on the CPU, may change itself.
        """
