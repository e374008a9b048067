"""The objective that a recipe names."""

from __future__ import annotations

from pathlib import Path

import torch

from latentgen.train.config import AutoencoderTask, FinetuneTask, PairedTask, TrainConfig, UpscaleTask
from latentgen.train.data import CaptionedDataset, open_data
from latentgen.train.objectives.autoencoder import AutoencoderObjective
from latentgen.train.objectives.base import Check, Objective, unchecked


def build_objective(
    config: TrainConfig,
    *,
    device: torch.device,
    assets: Path | None = None,
    data: CaptionedDataset | None = None,
    check: Check = unchecked,
) -> Objective:
    """The objective of a recipe, on the CPU, its networks initialised at random or from `init_from`.

    Args:
        config: the recipe.
        device: where the data may be prepared.
        assets: where an earlier part of the run has left its assets, if this is to go on with it.
        data: what to learn from; by default the recipe's whole set.
        check: looks at it before anything is drawn or encoded.
    """
    data = open_data(config.data) if data is None else data
    if isinstance(config.task, AutoencoderTask):
        autoencoder = AutoencoderObjective(config.task, data, init_from=config.init_from)
        check(autoencoder)
        return autoencoder
    if isinstance(config.task, UpscaleTask):
        from latentgen.train.objectives.upscale import UpscaleObjective

        return UpscaleObjective(
            config.task, data, seed=config.seed, device=device, init_from=config.init_from, check=check
        )
    if isinstance(config.task, PairedTask):
        from latentgen.train.objectives.paired import PairedObjective

        return PairedObjective(
            config.task, data, seed=config.seed, device=device, init_from=config.init_from, check=check
        )
    if isinstance(config.task, FinetuneTask):
        return _finetuning(config, config.task, data, device, check)
    from latentgen.train.objectives.text_to_image import TextToImageObjective

    return TextToImageObjective(
        config.task,
        data,
        seed=config.seed,
        device=device,
        init_from=config.init_from,
        assets=assets,
        check=check,
    )


def _finetuning(
    config: TrainConfig, task: FinetuneTask, data: CaptionedDataset, device: torch.device, check: Check
) -> Objective:
    from latentgen.train.objectives.finetune import FinetuneObjective, Origin

    origin = Origin(config.init_from, config.output_dir / "class_images")
    return FinetuneObjective(task, data, seed=config.seed, device=device, origin=origin, check=check)
