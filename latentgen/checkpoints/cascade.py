"""A cascade on disk: `cascade.json`, which names the folders of the stages in the order in which they run.

    {"stages": [{"folder": "outline", "num_inference_steps": 25},
                {"folder": "upscale", "num_inference_steps": 10, "guidance_scale": 1.0, "noise_level": 20}]}

A stage's folder is in the diffusers layout. Components that its `model_index.json` names but the folder lacks are read
from the cascade's folder, so that stages can share a text encoder and an autoencoder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from latentgen.checkpoints.folder import CheckpointFolder
from latentgen.errors import CheckpointNotFoundError
from latentgen.files import quote, read_json, safe_join
from latentgen.models.config import StageConfig

INDEX = "cascade.json"

# Far above any useful value, like the bounds of the fields of a stage.
MAX_STAGES = 16


class StageEntry(StageConfig):
    """One stage in `cascade.json`: its folder, and its settings where a call has none.

    `num_inference_steps`, `guidance_scale` and `scheduler` are those of a pipeline call; `noise_level` is for
    upscalers. A stage with a `strength` refines the previous stage's image at the same resolution (img2img).
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


def open_cascade(folder: Path) -> list[tuple[StageEntry, CheckpointFolder]]:
    """The stages of a cascade, in the order in which they run; reads no weights.

    Raises:
        CheckpointNotFoundError: `cascade.json` or the folder of a stage is missing.
        CheckpointCorruptError: an index is damaged.
        ConfigError: `cascade.json` has fields that are unknown or out of bounds.
        UnsafePathError: the path of a stage's folder leaves the cascade's folder.
    """
    path = folder / INDEX
    if not path.is_file():
        raise CheckpointNotFoundError(
            f"{quote(folder)} has no {INDEX}, which names the folders of a cascade's stages; load a single model with "
            "its own pipeline"
        )
    entries = CascadeIndex.from_json(read_json(path)).stages
    folders = (safe_join(folder, entry.folder, f"{quote(path)}, stages") for entry in entries)
    opened = (CheckpointFolder.open(stage, shared=folder) for stage in folders)
    return list(zip(entries, opened, strict=True))
