"""Errors of a recipe come before class images are generated or images encoded, which may take hours."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from latentgen.errors import ConfigError, InputError, LatentgenError, MemoryBudgetError
from latentgen.train import memory
from latentgen.train.data import BatchIndices
from latentgen.train.memory import batch_shapes, estimate_activations
from latentgen.train.objectives import build_objective
from latentgen.train.objectives.base import Objective
from latentgen.train.trainer import train
from tests.train.finetuning import Pictures, folder_of, objective_of
from tests.train.recipes import MakeRecipe, plan_for

CPU = torch.device("cpu")
PRIOR = "task.prior={prompt: dog, images: 4}"


@pytest.fixture
def nothing_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Generating and encoding images fails."""

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.setattr("latentgen.train.objectives.latent_diffusion.encode_views", fail)
    monkeypatch.setattr("latentgen.train.objectives.class_images.ClassImages.generate", fail)


TALL = "validation={prompts: [x], height: 17}"


@pytest.mark.usefixtures("nothing_slow")
@pytest.mark.parametrize(
    ("recipe", "overrides", "error", "message"),
    [
        ("text_to_image_recipe", (TALL,), InputError, "height=17"),
        ("lora_recipe", (TALL,), InputError, "height=17"),
        (
            "lora_recipe",
            ("task.method={kind: full}", PRIOR, "memory.base_dtype=int8"),
            ConfigError,
            r"memory\.base_dtype",
        ),
        ("lora_recipe", ("validation={prompts: ['(a cat:1001)']}",), InputError, "1001"),
        (
            "lora_recipe",
            ("task.method={kind: lora, targets: [x]}", PRIOR),
            ConfigError,
            r"task\.method\.targets: 'x'",
        ),
        ("lora_recipe", ("optimizer.name=adamw8bit",), ConfigError, "adamw8bit"),
        ("lora_recipe", ("task.loss.masked=true", PRIOR), ConfigError, r"task\.loss\.masked"),
    ],
)
def test_recipes_that_the_model_data_or_machine_does_not_allow(
    recipe: str,
    overrides: tuple[str, ...],
    error: type[LatentgenError],
    message: str,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(error, match=message):
        train(request.getfixturevalue(recipe)(*overrides))


@pytest.mark.usefixtures("nothing_slow")
@pytest.mark.parametrize(
    ("recipe", "field"),
    [
        ("text_to_image_recipe", "task.views_per_image=2"),
        ("upscale_recipe", "task.views_per_image=2"),
        ("paired_recipe", "task.views_per_image=0"),
        ("lora_recipe", PRIOR),
    ],
)
def test_a_step_that_does_not_fit(
    recipe: str, field: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(memory, "available_bytes", lambda _: -(10**12))
    config = request.getfixturevalue(recipe)("memory.planner=true", field)
    with pytest.raises(MemoryBudgetError, match="activations"):
        train(config)


@pytest.mark.parametrize(
    ("family", "views"), [("sd", 0), ("sdxl", 2), ("inpainting", 0), ("inpainting", 2), ("instruct", 2)]
)
def test_preflight_sees_the_shapes_of_a_real_batch(family: str, views: int, tmp_path: Path):
    def shapes(objective: Objective) -> list[Any]:
        batch = objective.batch(plan_for(objective))
        frozen = sum(p.numel() for p in objective.parameters() if not p.requires_grad)
        estimate = estimate_activations(objective, batch, CPU, Accelerator(cpu=True).autocast())
        return [*((t.shape, t.dtype) for t in batch), frozen, estimate]

    seen: list[Any] = []
    prior = None if family == "instruct" else {"prompt": "dog", "images": 4}
    objective = objective_of(
        {"kind": "lora", "rank": 2},
        folder_of(family),
        tmp_path,
        Pictures(),
        preflight=lambda looked_at: seen.extend(shapes(looked_at)),
        views_per_image=views,
        prior=prior,
    )
    assert seen == shapes(objective)


@pytest.mark.parametrize("parts", [1, 2])
def test_estimating_memory_builds_only_a_few_samples(
    parts: int, lora_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
):
    config = lora_recipe("batch_size=64", f"gradient_accumulation_steps={parts}")
    objective, accelerator = build_objective(config, device=CPU), Accelerator(cpu=True)
    whole = objective.batch(plan_for(objective, size=64 // parts))
    made: list[int] = []
    original = type(objective).batch

    def batch(self: Any, plan: BatchIndices, views: Any = None) -> tuple[Tensor, ...]:
        made.append(len(plan.samples))
        return original(self, plan, views)

    monkeypatch.setattr(type(objective), "batch", batch)
    shapes = batch_shapes(config, accelerator, objective)
    assert [(t.shape, t.dtype) for t in shapes] == [(t.shape, t.dtype) for t in whole]
    assert max(made) <= 8
    assert {t.device.type for t in shapes} == {"meta"}
