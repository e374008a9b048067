"""What is looked at before images are drawn or encoded, which may take hours, rather than after."""

from __future__ import annotations

from accelerate import Accelerator

from latentgen.errors import ConfigError
from latentgen.train.config import TrainConfig
from latentgen.train.data import CaptionedImages, sample_rng
from latentgen.train.memory import check_memory
from latentgen.train.objectives.base import Objective
from latentgen.train.samples import check_drawing


def check_objective(
    config: TrainConfig, accelerator: Accelerator, held_out: CaptionedImages | None, objective: Objective
) -> None:
    """Refuse what a recipe asks of an objective, before images are drawn or encoded.

    Raises:
        ConfigError: the objective cannot do what the recipe says.
        DatasetError: the images to measure on lack what the model is shown.
        InputError: a validation prompt cannot be drawn as the recipe says.
        MemoryBudgetError: a step does not fit into the device.
    """
    validation = config.validation
    if validation is not None and held_out is not None and objective.remakes:
        rng = sample_rng(validation.seed, "example", 0)
        objective.example(held_out.view(0, rng), rng)
    if validation is not None and validation.images and not objective.remakes:
        raise ConfigError(
            "validation.images: this model makes no image out of another; leave it out, and give it validation.prompts"
        )
    if validation is not None and validation.prompts:
        if objective.remakes:
            raise ConfigError(
                "validation.prompts: this model draws nothing from a prompt alone; leave them out, give it held_out or "
                "validation.data, and validation.images"
            )
        with objective.preview({}) as pipeline:
            check_drawing(pipeline, validation)
    check_memory(config, accelerator, objective)
