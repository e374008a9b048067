"""Checks of a recipe before class images are generated or images encoded, which may take hours."""

from __future__ import annotations

from accelerate import Accelerator

from latentgen.errors import ConfigError
from latentgen.train.config import TrainConfig
from latentgen.train.data import CaptionedDataset, sample_rng
from latentgen.train.ema import preview
from latentgen.train.memory import check_memory
from latentgen.train.objectives.base import Objective
from latentgen.train.validation import check_validation_prompts, is_image_conditioned


def check_objective(
    config: TrainConfig, accelerator: Accelerator, held_out: CaptionedDataset | None, objective: Objective
) -> None:
    """Refuse what an objective cannot do, before class images are generated or images encoded.

    Raises:
        ConfigError: the objective cannot do what the recipe asks for.
        DatasetError: the validation images lack what the model takes as input.
        InputError: a validation prompt, or the size of its image, is wrong.
        MemoryBudgetError: a step does not fit on the device, or what is offloaded does not fit on the host.
    """
    validation = config.validation
    pipeline = None if validation is None else objective.pipeline()
    if validation is not None and pipeline is not None:
        if not is_image_conditioned(pipeline):
            if validation.images:
                raise ConfigError(
                    "validation.images: this model does not take an image as input; remove it, and set "
                    "validation.prompts"
                )
        elif validation.prompts:
            raise ConfigError(
                "validation.prompts: this model also requires an image; remove them, and set "
                "validation_fraction or validation.data, and validation.images"
            )
        elif held_out is not None:
            rng = sample_rng(validation.seed, "example", 0)
            objective.validation_example(held_out.sample(0, rng), rng)
        if validation.prompts:
            with preview(objective, pipeline, {}) as previewed:
                check_validation_prompts(previewed, validation)
    check_memory(config, accelerator, objective)
