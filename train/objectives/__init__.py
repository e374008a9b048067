"""The training objectives, one for each kind of task; `build_objective` builds that of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from latentgen.train.config import AutoencoderTask, FinetuneTask, PairedTask, TrainConfig, UpscaleTask
from latentgen.train.data import CaptionedDataset, open_data
from latentgen.train.objectives.autoencoder import AutoencoderObjective
from latentgen.train.objectives.base import Objective, Preflight
from latentgen.train.objectives.finetune import FinetuneObjective
from latentgen.train.objectives.image_conditioned import PairedObjective, UpscaleObjective
from latentgen.train.objectives.text_to_image import TextToImageObjective


def build_objective(
    config: TrainConfig,
    *,
    device: torch.device,
    assets: Path | None = None,
    data: CaptionedDataset | None = None,
    preflight: Preflight | None = None,
) -> Objective:
    """The objective of a recipe, on the CPU, its networks initialized at random or from `init_from`.

    Images and captions are encoded on `device`; `data` is by default the whole set that the recipe names; `assets` is
    the folder with the tokenizer of text to image, if the run is resumed; `preflight` is called with the objective
    before anything is generated or encoded.
    """
    data = open_data(config.data) if data is None else data
    task, init_from = config.task, config.init_from
    if isinstance(task, AutoencoderTask):
        autoencoder = AutoencoderObjective(task, data, init_from=init_from)
        if preflight is not None:
            preflight(autoencoder)
        return autoencoder
    options: dict[str, Any] = {"seed": config.seed, "device": device, "init_from": init_from}
    options["preflight"] = preflight
    if isinstance(task, FinetuneTask):
        return FinetuneObjective(task, data, class_images=config.output_dir / "class_images", **options)
    if isinstance(task, UpscaleTask):
        return UpscaleObjective(task, data, **options)
    if isinstance(task, PairedTask):
        return PairedObjective(task, data, **options)
    return TextToImageObjective(task, data, assets=assets, **options)
