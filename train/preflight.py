"""Checks of a recipe before class images are generated or images encoded, which may take hours."""

from __future__ import annotations

import shutil

import torch
from accelerate import Accelerator

from latentgen.errors import ConfigError, MemoryBudgetError, OutputError
from latentgen.files import quote
from latentgen.train.config import TrainConfig
from latentgen.train.data import CaptionedDataset, sample_rng
from latentgen.train.memory import available_bytes, check_memory
from latentgen.train.objectives.base import Objective
from latentgen.train.offload import nearest
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
        OutputError: what is offloaded does not fit on the disk.
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
    if config.memory.offload_optimizer:
        _check_offload(config, accelerator.device, objective)


def _check_offload(config: TrainConfig, device: torch.device, objective: Objective) -> None:
    if device.type == "mps":
        raise ConfigError(
            "memory.offload_optimizer: mps shares the memory of the host, so nothing would be saved; remove it"
        )
    moments = 2 if config.optimizer.name == "adamw" else 0
    gradients = 0 if config.optimizer.step_in_backward else 1
    size = (moments + gradients) * sum(p.nbytes for p in objective.parameters() if p.requires_grad)
    needed = f"memory.offload_optimizer: gradients and moments take {size / 1e9:.3g} GB"
    if device.type == "cpu":
        folder = nearest(config.output_dir)
        if (free := shutil.disk_usage(folder).free) < size:
            raise OutputError(
                f"{needed} on the disk of {quote(folder)}, which has {free / 1e9:.3g} GB; make room, let output_dir be "
                "on another disk, or leave it out"
            )
    elif (free := available_bytes(torch.device("cpu"))) < size:
        raise MemoryBudgetError(f"{needed} of the host's memory, which has {free / 1e9:.3g} GB; leave it out")
