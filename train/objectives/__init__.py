"""What is trained: one objective for each kind of task, and the one that a recipe names."""

from __future__ import annotations

from pathlib import Path

import torch

from latentgen.train.config import (
    AutoencoderTask,
    FinetuneTask,
    PairedTask,
    TextToImageTask,
    TrainConfig,
    UpscaleTask,
)
from latentgen.train.data import CaptionedDataset, open_data
from latentgen.train.objectives.base import Objective, Preflight


def build_objective(
    config: TrainConfig,
    *,
    device: torch.device,
    assets: Path | None = None,
    data: CaptionedDataset | None = None,
    preflight: Preflight | None = None,
) -> Objective:
    """The objective of a recipe, on the CPU, its networks initialized at random or from `init_from`.

    Args:
        config: the recipe.
        device: where images and captions are encoded.
        assets: the folder that `save_assets` wrote to, if the run is resumed.
        data: the training set; by default the whole set that the recipe names.
        preflight: called with the objective before anything is drawn or encoded.
    """
    data = open_data(config.data) if data is None else data
    task = config.task
    if isinstance(task, AutoencoderTask):
        from latentgen.train.objectives.autoencoder import AutoencoderObjective

        autoencoder = AutoencoderObjective(task, data, init_from=config.init_from)
        if preflight is not None:
            preflight(autoencoder)
        return autoencoder
    if isinstance(task, FinetuneTask):
        from latentgen.train.objectives.finetune import FinetuneObjective

        return FinetuneObjective(
            task,
            data,
            seed=config.seed,
            device=device,
            init_from=config.init_from,
            class_images=config.output_dir / "class_images",
            preflight=preflight,
        )
    if isinstance(task, UpscaleTask):
        from latentgen.train.objectives.image_conditioned import UpscaleObjective

        return UpscaleObjective(
            task, data, seed=config.seed, device=device, init_from=config.init_from, preflight=preflight
        )
    if isinstance(task, PairedTask):
        from latentgen.train.objectives.image_conditioned import PairedObjective

        return PairedObjective(
            task, data, seed=config.seed, device=device, init_from=config.init_from, preflight=preflight
        )
    from latentgen.train.objectives.text_to_image import TextToImageObjective

    return TextToImageObjective(
        task,
        data,
        seed=config.seed,
        device=device,
        init_from=config.init_from,
        assets=assets,
        preflight=preflight,
    )


def save_assets(config: TrainConfig, objective: Objective, folder: Path) -> None:
    """Write what a resumed run needs besides weights: the tokenizer of text to image, if it was made from captions."""
    if isinstance(config.task, TextToImageTask):
        from latentgen.train.objectives.text_to_image import TextToImageObjective

        assert isinstance(objective, TextToImageObjective)
        objective.save_tokenizer(folder)
