"""What all objectives over a finished text encoder have in common, whatever the UNet is shown."""

from __future__ import annotations

import pytest
import torch

from latentgen.train.config import TrainConfig
from latentgen.train.data import plan_step
from latentgen.train.objectives import build_objective
from latentgen.train.objectives.image_conditioned import PairedObjective, UpscaleObjective
from tests.train.recipes import COLOURS, MakeRecipe, plan_for


@pytest.fixture(params=["upscale_recipe", "paired_recipe"])
def recipe(request: pytest.FixtureRequest) -> MakeRecipe:
    return request.getfixturevalue(request.param)


def build(config: TrainConfig) -> PairedObjective | UpscaleObjective:
    torch.manual_seed(1)
    objective = build_objective(config, device=torch.device("cpu"))
    assert isinstance(objective, PairedObjective | UpscaleObjective)
    return objective


def assert_batches_follow_their_plans(config: TrainConfig) -> None:
    objective, again = build(config), build(config)
    plan = plan_for(objective)
    for ours, theirs in zip(objective.batch(plan), again.batch(plan), strict=True):
        assert torch.equal(ours, theirs)
    (_, part) = plan_step(3, 0, batch_size=8, order=objective.order, parts=2, rank=0, processes=1)
    for whole, half in zip(objective.batch(plan), objective.batch(part), strict=True):
        assert torch.equal(whole[list(part.samples)], half)


def test_a_batch_is_a_function_of_its_plan(recipe: MakeRecipe):
    assert_batches_follow_their_plans(recipe())


def test_so_is_one_whose_degradation_is_random(paired_recipe: MakeRecipe):
    assert_batches_follow_their_plans(paired_recipe("task.degradation=inpainting"))


def test_gradients_reach_the_unet_alone(recipe: MakeRecipe):
    objective = build(recipe())
    objective(*objective.batch(plan_for(objective))).total.backward()
    trained = {name.split(".")[0] for name, p in objective.named_parameters() if p.requires_grad}
    assert trained == {"unet"}
    assert all(parameter.grad is not None for parameter in objective.unet.parameters())
    assert all(parameter.grad is None for parameter in objective._text.module.parameters())


def test_captions_belong_to_their_images_and_are_dropped(recipe: MakeRecipe):
    texts = [f"{colour} disc" for colour in sorted(COLOURS)]
    for rate, due in ((0, lambda item: texts[item // 2]), (1, lambda _: "")):
        objective = build(recipe(f"task.caption_dropout={rate}"))
        plan = plan_for(objective, size=12)
        context = objective.batch(plan)[3]
        expected = objective._text.encode([due(item) for item in plan.items]).context
        torch.testing.assert_close(context, expected, atol=2e-6, rtol=1e-5)
