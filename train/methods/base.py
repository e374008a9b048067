"""What a method of fine-tuning is, and what all of them need."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from latentgen.checkpoints.weights import save_weights
from latentgen.models.text import CLIPText
from latentgen.pipelines.base import Pipeline
from latentgen.pipelines.load_save import named_towers

AnyPipeline = TypeVar("AnyPipeline", bound=Pipeline)


class Method(ABC):
    """A way to teach a model something new.

    Attributes:
        trains_text: whether gradients are needed of what the text encoders compute.
    """

    trains_text: bool

    @abstractmethod
    def put_into(self, pipeline: AnyPipeline) -> AnyPipeline:
        """The pipeline to train with, whose stages may be those of `pipeline`: what learns requires gradients.

        Raises:
            ConfigError: the recipe does not fit the model.
        """

    @abstractmethod
    def save(self, pipeline: Pipeline, folder: Path, *, half: bool) -> None:
        """Write what was learnt, from the pipeline that `put_into` gave, on the CPU; in float16 if `half`.

        Training is over: the stages may change.
        """


def towers_of(pipeline: Pipeline) -> dict[str, CLIPText]:
    """The text encoders by the names of their components."""
    return named_towers(pipeline.unet, pipeline.text_encoder)


def layers_without_gradient(towers: Sequence[CLIPText]) -> list[nn.Module]:
    """The layers of text encoders that nothing which the UNet is given depends on.

    The context of SDXL leaves out the last layer of each, and the pooled state is the second one's. Parameters that
    never get gradients would stop a distributed run.
    """
    unused: list[nn.Module] = []
    for tower in towers:
        pools = len(towers) > 1 and tower is towers[-1]
        names = {name: module for name, module in tower.model.named_modules() if name}
        if tower.layer == "penultimate" and not pools:
            last = f"encoder.layers.{tower.config.num_hidden_layers - 1}"
            unused += [module for name, module in names.items() if name.endswith((last, "final_layer_norm"))]
        if not pools and "text_projection" in names:
            unused.append(names["text_projection"])
    return unused


def save_learnt(
    file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, half: bool
) -> None:
    """Write what was learnt into a safetensors file, in float32, or in float16 if `half`."""
    dtype = torch.float16 if half else torch.float32
    typed = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    save_weights(typed, file.parent, file.stem, max_shard_bytes=sys.maxsize, metadata=metadata)
