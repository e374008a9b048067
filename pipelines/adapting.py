"""The networks of a pipeline with adapters: copies that share all weights with the originals."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from torch import nn

from latentgen.adapters import lora as loras
from latentgen.adapters.lora_files import read_lora
from latentgen.adapters.textual_inversion import read_embedding
from latentgen.adapters.textual_inversion import with_embedding as with_vectors
from latentgen.errors import InputError
from latentgen.files import quote
from latentgen.models.lora import shared_copy
from latentgen.models.text import TextEncoder, join_towers
from latentgen.models.unet import UNet
from latentgen.pipelines.run import Stages
from latentgen.pipelines.saving import named_towers


class AdaptedStages(NamedTuple):
    """What adapters change of a pipeline."""

    unet: UNet
    text_encoder: TextEncoder


def with_lora(
    stages: Stages, source: str | Path, weight: float, *, name: str | None, merged: bool
) -> AdaptedStages:
    """Copies with a LoRA attached, or added to new weights; see :mod:`latentgen.adapters.lora` for the errors."""
    lora, copies = read_lora(source), _copies(stages)
    if merged:
        loras.merge(_components(copies), lora, weight)
    else:
        loras.attach(_components(copies), lora, weight, name=name)
    return copies


def with_lora_weight(stages: Stages, name: str, weight: float) -> AdaptedStages:
    """Copies in which an attached LoRA has another weight."""
    copies = _copies(stages)
    loras.set_weight(_components(copies), name, weight)
    return copies


def without_lora(stages: Stages, name: str) -> AdaptedStages:
    """Copies without an attached LoRA."""
    copies = _copies(stages)
    loras.detach(_components(copies), name)
    return copies


def with_embedding(stages: Stages, source: str | Path, *, token: str | None) -> AdaptedStages:
    """The same UNet, and text encoders that know one more token."""
    towers = with_vectors(named_towers(stages.unet, stages.text_encoder), read_embedding(source, token=token))
    return AdaptedStages(stages.unet, join_towers(list(towers.values())))


def attached_loras(stages: Stages) -> dict[str, float]:
    """The weight of each attached LoRA, by name."""
    return loras.attached(_components(AdaptedStages(stages.unet, stages.text_encoder)))


def refuse_attached(stages: Stages) -> None:
    """Raise InputError where attached LoRAs would be lost, because only weights go on."""
    if names := attached_loras(stages):
        raise InputError(
            f"the LoRAs {', '.join(map(quote, names))} are attached and would be lost; use with_lora(..., merged=True) "
            "to make them part of the weights, or without_lora(...)"
        )


def _copies(stages: Stages) -> AdaptedStages:
    towers = [tower.with_model(shared_copy(tower.model)) for tower in stages.text_encoder.towers]
    return AdaptedStages(shared_copy(stages.unet), join_towers(towers))


def _components(stages: AdaptedStages) -> dict[str, nn.Module]:
    towers = named_towers(stages.unet, stages.text_encoder)
    return {"unet": stages.unet, **{name: tower.model for name, tower in towers.items()}}
