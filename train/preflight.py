"""Checks of a recipe before class images are generated or images encoded, which may take hours."""

from __future__ import annotations

from accelerate import Accelerator

from latentgen.errors import ConfigError
from latentgen.train.config import TrainConfig
from latentgen.train.data import CaptionedDataset, sample_rng
from latentgen.train.memory import check_memory
from latentgen.train.objectives.base import Objective
from latentgen.train.validation import check_validation_prompts


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
    if validation is not None and held_out is not None and objective.remakes:
        rng = sample_rng(validation.seed, "example", 0)
        objective.example(held_out.sample(0, rng), rng)
    if validation is not None and validation.images and not objective.remakes:
        raise ConfigError(
            "validation.images: this model does not take an image as input; remove it, and set validation.prompts"
        )
    if validation is not None and validation.prompts:
        if objective.remakes:
            raise ConfigError(
                "validation.prompts: this model also requires an image; remove them, and set "
                "validation_fraction or validation.data, and validation.images"
            )
        with objective.preview({}) as pipeline:
            check_validation_prompts(pipeline, validation)
    check_memory(config, accelerator, objective)
