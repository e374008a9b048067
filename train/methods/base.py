"""The interface of fine-tuning methods; and full fine-tuning, which trains the networks themselves."""

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
from latentgen.train.config.tasks import FullMethod

AnyPipeline = TypeVar("AnyPipeline", bound=Pipeline)


class Method(ABC):
    """A way to fine-tune a model: which weights are trained, and what is saved of them."""

    @abstractmethod
    def inject(self, pipeline: AnyPipeline) -> AnyPipeline:
        """The pipeline to train, which may share its stages with `pipeline`: trained parameters require gradients.

        Raises:
            ConfigError: the recipe does not fit the model.
        """

    @abstractmethod
    def save(self, pipeline: Pipeline, folder: Path, *, half: bool) -> None:
        """Write what was trained.

        Args:
            pipeline: from `inject`, on the CPU. Training is over, so its stages may be modified.
            folder: the output folder.
            half: in float16 instead of float32.
        """


class FullFinetuning(Method):
    """Trains all weights of the UNet, and of the text encoders if the recipe says so; saves the whole model."""

    def __init__(self, config: FullMethod) -> None:
        self._trains_text = config.train_text_encoder

    def inject(self, pipeline: AnyPipeline) -> AnyPipeline:
        """Unfreeze the networks."""
        pipeline.unet.requires_grad_(True)
        if self._trains_text:
            pipeline.text_encoder.module.requires_grad_(True)
            for module in layers_without_gradient(pipeline.text_encoder.towers):
                module.requires_grad_(False)
        return pipeline

    def save(self, pipeline: Pipeline, folder: Path, *, half: bool) -> None:
        """Write a folder in the diffusers layout."""
        stages = (pipeline.unet, pipeline.text_encoder.module, pipeline.encoder(), pipeline.decoder)
        nn.ModuleList(stages).to(torch.float16 if half else torch.float32)
        pipeline.save_pretrained(folder)


def towers_of(pipeline: Pipeline) -> dict[str, CLIPText]:
    """The text encoders by the names of their components."""
    return named_towers(pipeline.unet, pipeline.text_encoder)


def layers_without_gradient(towers: Sequence[CLIPText]) -> list[nn.Module]:
    """The layers of text encoders that do not affect the UNet's conditioning.

    The context of SDXL leaves out the last layer of each, and only the second one's pooled state is used. Parameters
    that never get gradients would stop a distributed run.
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


def save_adapter(
    file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, half: bool
) -> None:
    """Write the tensors of an adapter into one safetensors file, in float32, or in float16 if `half`."""
    dtype = torch.float16 if half else torch.float32
    typed = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    save_weights(typed, file.parent, file.stem, max_shard_bytes=sys.maxsize, metadata=metadata)
