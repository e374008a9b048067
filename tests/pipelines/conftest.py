from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from latentgen.pipelines.text_to_image import TextToImagePipeline

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


@pytest.fixture(scope="session")
def pipeline(tiny_checkpoint: Path) -> TextToImagePipeline:
    """Ours, in float32 on the CPU."""
    return TextToImagePipeline.from_pretrained(tiny_checkpoint, dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def oracle(tiny_checkpoint: Path) -> StableDiffusionPipeline:
    """The same folder as diffusers reads it."""
    return load_oracle(tiny_checkpoint)


def load_oracle(folder: Path) -> StableDiffusionPipeline:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
