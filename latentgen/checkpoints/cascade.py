"""A cascade on disk: `cascade.json`, which names the folders of the stages in the order in which they draw.

    {"stages": [{"folder": "outline", "num_inference_steps": 25},
                {"folder": "upscale", "num_inference_steps": 10, "guidance_scale": 1.0, "noise_level": 20}]}

A stage's folder stands in the diffusers layout. What its `model_index.json` names and the folder does not hold is taken
from the cascade's folder, so that stages can share a text encoder and an autoencoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from latentgen.checkpoints.folder import CheckpointFolder
from latentgen.checkpoints.weights import Weights
from latentgen.errors import CheckpointNotFoundError
from latentgen.files import quote, read_json, safe_join
from latentgen.models.config import StageConfig

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

INDEX = "cascade.json"

# Far beyond any use, as are the bounds of its numbers.
MAX_STAGES = 16


class StageEntry(StageConfig):
    """One stage in `cascade.json`: its folder, and how it is run where a call does not say.

    `num_inference_steps`, `guidance_scale` and `scheduler` mean what they mean to a pipeline; `noise_level` is for
    upscalers. A stage with a `strength` draws what the one before has drawn anew, at the same size.
    """

    diffusers_class: ClassVar[str] = "the stage of a cascade"

    folder: str
    num_inference_steps: Annotated[int, Field(ge=1, le=100_000)] | None = None
    guidance_scale: Annotated[float, Field(ge=0, le=1e6)] | None = None
    scheduler: str | None = None
    noise_level: Annotated[int, Field(ge=0, le=100_000)] | None = None
    strength: Annotated[float, Field(gt=0, le=1)] | None = None


class CascadeIndex(StageConfig):
    """The content of `cascade.json`."""

    diffusers_class: ClassVar[str] = INDEX

    stages: Annotated[tuple[StageEntry, ...], Field(min_length=1, max_length=MAX_STAGES)]


@dataclass(frozen=True)
class StageFolder:
    """A stage's folder, and beside it the one that holds what the stages share.

    Attributes:
        own: the stage's folder.
        shared: the cascade's folder, of which the stage's index says what is taken.
    """

    own: CheckpointFolder
    shared: CheckpointFolder

    @property
    def path(self) -> Path:
        """The stage's folder."""
        return self.own.path

    @property
    def model_index(self) -> Mapping[str, object]:
        """That of the stage."""
        return self.own.model_index

    @property
    def components(self) -> dict[str, str]:
        """Those of the stage, wherever they stand."""
        return self.own.components

    def config(self, component: str) -> dict[str, object]:
        """The JSON configuration of one component."""
        return self._holder(component).config(component)

    def weights(self, component: str, variant: str | None = None) -> Weights:
        """Where the weights of one component lie."""
        return self._holder(component).weights(component, variant)

    def tokenizer(self, component: str) -> CLIPTokenizer:
        """A tokenizer, "tokenizer" or "tokenizer_2"."""
        return self._holder(component).tokenizer(component)

    def _holder(self, component: str) -> CheckpointFolder:
        return self.own if self.own.folder(component).is_dir() else self.shared


def open_cascade(folder: Path) -> list[tuple[StageEntry, StageFolder]]:
    """The stages of a cascade, in the order in which they draw; reads no weights.

    Raises:
        CheckpointNotFoundError: there is no `cascade.json`, or not the folder of a stage.
        CheckpointCorruptError: an index is not what it should be.
        ConfigError: `cascade.json` has fields that are unknown or out of bounds.
        UnsafePathError: a stage's folder is a path that leads elsewhere.
    """
    path = folder / INDEX
    if not path.is_file():
        raise CheckpointNotFoundError(
            f"{quote(folder)} holds no {INDEX}, which names the folders of the stages of a cascade; one model alone is "
            "loaded by its own pipeline"
        )
    stages = []
    for entry in CascadeIndex.from_json(read_json(path)).stages:
        own = CheckpointFolder.open(safe_join(folder, entry.folder, f"{quote(path)}, stages"))
        stages.append((entry, StageFolder(own, CheckpointFolder(folder, own.model_index))))
    return stages
