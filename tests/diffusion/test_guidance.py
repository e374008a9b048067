from __future__ import annotations

import math

import pytest
import torch

from latentgen.diffusion.guidance import (
    CFGPlusPlus,
    ClassifierFree,
    GuidanceInterval,
    PerpendicularNegative,
    Rescaled,
    TextAndImage,
    guided,
    is_guided,
)
from latentgen.diffusion.schedule import NoiseLevel
from latentgen.diffusion.scheduler import Scheduler
from latentgen.diffusion.solver_names import SolverName
from latentgen.errors import InputError

LEVEL = NoiseLevel.from_sigma_ve(2.0, 500.0)
X, UNCONDITIONAL, IMAGE, CONDITIONAL = torch.randn(4, 2, 4, 3, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("guidance_scale", [1.5, 7.5, 30.0])
def test_raw_outputs_are_combined_before_x0(guidance_scale: float) -> None:
    denoise = guided(
        lambda x, level, rows: (UNCONDITIONAL, CONDITIONAL), "epsilon", ClassifierFree(guidance_scale)
    )
    epsilon = UNCONDITIONAL + guidance_scale * (CONDITIONAL - UNCONDITIONAL)
    expected = (X - LEVEL.sigma * epsilon) / LEVEL.alpha
    torch.testing.assert_close(denoise(X, LEVEL), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("guidance_scale", [-2.0, 0.0, 1.0])
def test_at_scale_1_and_below_there_is_one_output(guidance_scale: float) -> None:
    assert not is_guided(guidance_scale)
    guidance = ClassifierFree(guidance_scale)
    assert guidance.num_branches == 1
    assert torch.equal(
        guided(lambda x, level, rows: (CONDITIONAL,), "sample", guidance)(X, LEVEL), CONDITIONAL
    )


@pytest.mark.parametrize("guidance_scale", [math.nan, math.inf])
def test_a_scale_that_is_no_number_is_refused(guidance_scale: float) -> None:
    with pytest.raises(InputError, match="guidance_scale"):
        ClassifierFree(guidance_scale)


def test_image_and_text_guide_apart() -> None:
    outputs = (UNCONDITIONAL, IMAGE, CONDITIONAL)
    assert TextAndImage(7.5, 1.5).num_branches == len(outputs)
    expected = UNCONDITIONAL + 7.5 * (CONDITIONAL - IMAGE) + 1.5 * (IMAGE - UNCONDITIONAL)
    torch.testing.assert_close(TextAndImage(7.5, 1.5)(outputs), expected)
    # With scales of 1 nothing but the full condition is left; with equal scales the image alone does not matter.
    torch.testing.assert_close(TextAndImage(1.0, 1.0)(outputs), CONDITIONAL)
    torch.testing.assert_close(
        TextAndImage(3.0, 3.0)(outputs), ClassifierFree(3.0)((UNCONDITIONAL, CONDITIONAL))
    )


def test_a_rescaled_result_is_that_of_diffusers() -> None:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    outputs = (UNCONDITIONAL, CONDITIONAL)
    plain = ClassifierFree(7.5)(outputs)
    for phi in (0.3, 0.7, 1.0):
        expected = rescale_noise_cfg(plain, CONDITIONAL, guidance_rescale=phi)
        torch.testing.assert_close(Rescaled(ClassifierFree(7.5), phi)(outputs), expected)
    whole = Rescaled(ClassifierFree(7.5), 1.0)(outputs)
    torch.testing.assert_close(whole.std((1, 2, 3)), CONDITIONAL.std((1, 2, 3)))


def test_a_parallel_negative_prompt_changes_nothing() -> None:
    guidance, plain = PerpendicularNegative(7.5), ClassifierFree(7.5)((UNCONDITIONAL, CONDITIONAL))
    for negative in (CONDITIONAL, UNCONDITIONAL, torch.lerp(UNCONDITIONAL, CONDITIONAL, -0.4)):
        torch.testing.assert_close(
            guidance((UNCONDITIONAL, negative, CONDITIONAL)), plain, rtol=1e-4, atol=1e-4
        )
    assert guidance((CONDITIONAL, IMAGE, CONDITIONAL)).isfinite().all()


def test_only_the_perpendicular_component_is_subtracted() -> None:
    towards, away = CONDITIONAL - UNCONDITIONAL, IMAGE - UNCONDITIONAL
    found = PerpendicularNegative(7.5, 0.5)((UNCONDITIONAL, IMAGE, CONDITIONAL))
    removed = (UNCONDITIONAL + 7.5 * towards - found) / (7.5 * 0.5)
    assert ((removed * towards).sum((1, 2, 3)).abs() < 1e-2).all()
    parallel = away - removed
    torch.testing.assert_close(
        parallel / parallel.norm(),
        towards
        * (parallel * towards).sum((1, 2, 3), keepdim=True)
        / towards.square().sum((1, 2, 3), keepdim=True)
        / parallel.norm(),
        rtol=1e-3,
        atol=1e-4,
    )


def test_outside_of_its_interval_only_one_output_is_computed() -> None:
    guidance = GuidanceInterval(ClassifierFree(7.5), lowest=200.0, highest=800.0)
    branches = []

    def predict(x: torch.Tensor, level: NoiseLevel, rows: int) -> tuple[torch.Tensor, ...]:
        branches.append(rows)
        return (UNCONDITIONAL, CONDITIONAL)[-rows:]

    denoise = guided(predict, "sample", guidance)
    for timestep, inside in ((800.0, False), (799.0, True), (200.0, True), (199.0, False)):
        found = denoise(X, NoiseLevel.from_sigma_ve(2.0, timestep))
        expected = ClassifierFree(7.5)((UNCONDITIONAL, CONDITIONAL)) if inside else CONDITIONAL
        assert torch.equal(found, expected)
    assert branches == [1, 2, 2, 1]


@pytest.mark.parametrize("solver", ["ddim", "euler", "euler_ancestral", "ddpm"])
def test_cfg_plus_plus_keeps_the_unconditional_noise(solver: SolverName) -> None:
    scheduler = Scheduler(solver=solver)
    assert scheduler.supports_cfg_pp
    level, target = scheduler.levels(6)[:2]
    predict = (torch.tanh(X) + 0.1 * UNCONDITIONAL, torch.sin(X) + 0.1 * CONDITIONAL)
    x0 = (X - level.sigma * torch.lerp(*predict, 0.6)) / level.alpha
    fresh = 0.0
    if solver in ("euler_ancestral", "ddpm"):
        fresh = target.sigma / level.sigma * math.sqrt(1 - (level.alpha / target.alpha) ** 2)
    expected = target.alpha * x0 + math.sqrt(target.sigma**2 - fresh**2) * predict[0] + fresh * IMAGE
    denoiser = guided(lambda x, level, rows: predict, "epsilon", CFGPlusPlus(0.6))
    first = next(iter(scheduler.sample(denoiser, X, scheduler.levels(6), lambda: IMAGE)))
    torch.testing.assert_close(first.latents, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(first.x0, x0, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("solver", ["dpmpp_2m", "heun"])
def test_solvers_of_several_evaluations_do_not_support_cfg_plus_plus(solver: SolverName) -> None:
    assert not Scheduler(solver=solver).supports_cfg_pp
