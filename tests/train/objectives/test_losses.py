"""The loss of a recipe against the formulas of the scripts of diffusers and kohya."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from latentgen.diffusion.prediction import PredictionType, add_noise, from_x0, target
from latentgen.diffusion.schedule import BatchNoiseLevel, NoiseSchedule
from latentgen.diffusion.scheduler import Scheduler
from latentgen.errors import ConfigError
from latentgen.train.config import P2, Debiased, LatentLoss, MinSNR, PyramidNoise
from latentgen.train.data import BatchIndices, BucketSampler, Sample, plan_step
from latentgen.train.data.folder import ImageFolder
from latentgen.train.objectives import build_objective
from latentgen.train.objectives.latent_diffusion import LatentObjective
from latentgen.train.objectives.losses import (
    elementwise_error,
    level_weights,
    pyramid_noise,
    sample_errors,
    signal_to_noise,
    training_noise,
    training_scheduler,
)
from latentgen.train.trainer import train
from tests.train.recipes import MakeRecipe, plan_for

ZERO_SNR = "task.loss.zero_terminal_snr=true"
MIN_SNR = "task.loss.weighting={kind: min_snr, gamma: 5}"
SHAPE = (4, 16, 16)
NOISES = [
    LatentLoss(offset_noise=0.1),
    LatentLoss(pyramid_noise=PyramidNoise()),
    LatentLoss(offset_noise=0.1, pyramid_noise=PyramidNoise(discount=0.8)),
]


@pytest.fixture(params=["text_to_image_recipe", "upscale_recipe", "paired_recipe"])
def recipe(request: pytest.FixtureRequest) -> MakeRecipe:
    """Each of the latent tasks in turn."""
    return request.getfixturevalue(request.param)


def build(make: MakeRecipe, *overrides: str) -> LatentObjective[Any]:
    torch.manual_seed(1)
    objective = build_objective(make(*overrides), device=torch.device("cpu"))
    assert isinstance(objective, LatentObjective)
    return objective


def gradients(objective: LatentObjective[Any], loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(objective.unet.parameters()), allow_unused=False))


def output_of(objective: LatentObjective[Any], batch: tuple[Tensor, ...], noise: Tensor) -> Tensor:
    latents, _, timesteps, *cond = batch
    level = objective.scheduler.schedule.batch(timesteps)
    text = objective._conditioner.conditioning(cond)
    return objective._predict(add_noise(latents, noise, level), timesteps, text, *cond)


def diffusers_target(objective: LatentObjective[Any], batch: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """The target of diffusers' scripts and the signal-to-noise ratios."""
    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_snr

    scheduler: Any = DDPMScheduler.from_config(objective.scheduler.to_config())
    latents, noise, timesteps = batch[:3]
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        expected = noise
    else:
        expected = latents if kind == "sample" else scheduler.get_velocity(latents, noise, timesteps)
    return expected, compute_snr(scheduler, timesteps)


def test_a_recipe_that_says_nothing_is_the_plain_mean_squared_error(recipe: MakeRecipe):
    objective = build(recipe)
    assert objective.task.loss == LatentLoss()
    assert objective.scheduler == Scheduler.from_config(objective.task.scheduler)
    plan = plan_for(objective)
    batch = objective.batch(plan)
    assert len(batch) == 4 + {"text_to_image": 0, "paired": 1, "upscale": 2}[objective.task.kind]
    latents, noise, timesteps = batch[:3]
    assert torch.equal(noise, plan.noise(latents.shape[1:], "noise"))
    loss = objective(*batch)
    level = objective.scheduler.schedule.batch(timesteps)
    expected = level.alpha * noise - level.sigma * latents
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        errors = F.mse_loss(output_of(objective, batch, noise), expected, reduction="none")
        plain = errors.mean(dim=(1, 2, 3)).mean()
    assert torch.equal(loss.total, plain)
    for ours, theirs in zip(gradients(objective, loss.total), gradients(objective, plain), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_min_snr_gives_the_loss_and_gradients_of_diffusers_script(
    prediction_type: str, text_to_image_recipe: MakeRecipe
):
    objective = build(text_to_image_recipe, MIN_SNR, f"task.scheduler.prediction_type={prediction_type}")
    batch = objective.batch(plan_for(objective))
    expected, snr = diffusers_target(objective, batch)
    # As train_text_to_image.py has it, and the paper for the sample.
    weights = torch.stack([snr, 5.0 * torch.ones_like(batch[2])], dim=1).min(dim=1)[0]
    weights = weights / {"epsilon": snr, "v_prediction": snr + 1, "sample": 1}[prediction_type]
    loss = F.mse_loss(output_of(objective, batch, batch[1]).float(), expected.float(), reduction="none")
    loss = (loss.mean(dim=list(range(1, len(loss.shape)))) * weights).mean()
    ours = objective(*batch).total
    assert ours.item() == pytest.approx(loss.item(), rel=1e-5)
    for mine, theirs in zip(gradients(objective, ours), gradients(objective, loss), strict=True):
        assert (mine - theirs).norm() <= 1e-5 * theirs.norm()


def test_the_weights_of_debiased_estimation_and_p2():
    snr = signal_to_noise(Scheduler().schedule.batch(torch.tensor([0, 1, 20, 500, 999])))
    capped = snr.clamp(max=1000)
    assert snr[0] > 1000
    debiased, p2 = Debiased(kind="debiased"), P2(kind="p2", gamma=0.5, k=2.0)
    torch.testing.assert_close(level_weights(snr, "epsilon", debiased), 1 / torch.sqrt(capped))
    # As kohya's trainer has it.
    torch.testing.assert_close(level_weights(snr, "v_prediction", debiased), 1 / (capped + 1))
    torch.testing.assert_close(level_weights(snr, "epsilon", p2), 1 / torch.sqrt(2 + snr))


@pytest.mark.parametrize(
    ("prediction_type", "weighting"),
    [
        ("sample", MinSNR(kind="min_snr")),
        ("v_prediction", MinSNR(kind="min_snr")),
        ("sample", P2(kind="p2")),
        ("v_prediction", P2(kind="p2")),
        ("sample", Debiased(kind="debiased")),
    ],
)
def test_an_error_of_x0_counts_the_same_for_each_prediction_type(
    prediction_type: PredictionType, weighting: MinSNR | P2 | Debiased
):
    timesteps = torch.tensor([100, 200, 500, 700, 998, 999])
    alpha = torch.tensor(NoiseSchedule(1000, 0.00085, 0.012, "scaled_linear").alphas_cumprod)[
        timesteps
    ].sqrt()
    level = BatchNoiseLevel(alpha.view(-1, 1, 1, 1), (1 - alpha**2).sqrt().view(-1, 1, 1, 1), timesteps)
    generator = torch.Generator().manual_seed(0)
    x0, noise, error = torch.randn(3, len(timesteps), 4, 8, 8, generator=generator, dtype=torch.float64)
    weighted = []
    for kind in (prediction_type, "epsilon"):
        output = from_x0(x0 + error, add_noise(x0, noise, level), level, kind)
        squared = (output - target(x0, noise, level, kind)).square().mean(dim=(1, 2, 3))
        weighted.append(level_weights(signal_to_noise(level), kind, weighting) * squared)
    torch.testing.assert_close(weighted[0], weighted[1])


@pytest.mark.parametrize("weighting", ["{kind: debiased}", "{kind: p2}", "{kind: min_snr}"])
def test_every_weighting_is_finite_where_the_schedule_ends_without_signal(
    weighting: str, text_to_image_recipe: MakeRecipe
):
    objective = build(text_to_image_recipe, ZERO_SNR, f"task.loss.weighting={weighting}")
    latents, noise, timesteps, tokens = objective.batch(plan_for(objective))
    timesteps[0] = 999
    loss = objective(latents, noise, timesteps, tokens).total
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients(objective, loss))


def test_zero_terminal_snr_is_diffusers_rescale_and_is_saved(
    text_to_image_recipe: MakeRecipe, tmp_path: Path
):
    from diffusers import DDPMScheduler

    model = train(text_to_image_recipe(ZERO_SNR, "max_steps=1"))
    saved = json.loads((model / "scheduler" / "scheduler_config.json").read_text("utf-8"))
    assert saved["rescale_betas_zero_snr"] is True
    assert saved["timestep_spacing"] == "trailing"
    assert saved["prediction_type"] == "v_prediction"
    theirs = DDPMScheduler.from_pretrained(model / "scheduler").alphas_cumprod
    schedule = build(text_to_image_recipe, ZERO_SNR).scheduler.schedule
    assert isinstance(schedule, NoiseSchedule)
    ours = torch.tensor(schedule.alphas_cumprod).float()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)
    assert ours[-1] == 0


def test_a_schedule_that_ends_without_signal_stays(text_to_image_recipe: MakeRecipe):
    rescaled = ("task.scheduler.rescale_betas_zero_snr=true", "task.scheduler.timestep_spacing=trailing")
    scheduler = build(text_to_image_recipe, *rescaled).scheduler
    assert training_scheduler(scheduler, LatentLoss(zero_terminal_snr=True)) == scheduler


@pytest.mark.parametrize("override", [ZERO_SNR, "task.scheduler.rescale_betas_zero_snr=true"])
def test_epsilon_is_refused_without_signal(override: str, text_to_image_recipe: MakeRecipe):
    with pytest.raises(ConfigError, match=r"prediction_type.*v_prediction"):
        build(text_to_image_recipe, override, "task.scheduler.prediction_type=epsilon")


def test_what_does_not_fit_the_scheduler_is_refused():
    pndm = Scheduler(prediction_type="v_prediction", solver="pndm")
    with pytest.raises(ConfigError, match=r"DDIMScheduler.*PNDMScheduler"):
        training_scheduler(pndm, LatentLoss(zero_terminal_snr=True))
    flow = Scheduler.from_config({"_class_name": "FlowMatchEulerDiscreteScheduler"})
    assert training_scheduler(flow, LatentLoss()) is flow
    with pytest.raises(ConfigError, match=r"task\.loss"):
        training_scheduler(flow, LatentLoss(zero_terminal_snr=True))


def test_a_perturbed_input_is_what_diffusers_script_shows(recipe: MakeRecipe):
    objective = build(recipe, "task.loss.input_perturbation=0.1")
    plan = plan_for(objective)
    latents, noise, timesteps, tokens, seen, *cond = batch = objective.batch(plan)
    torch.testing.assert_close(seen, noise + 0.1 * plan.noise(noise.shape[1:], "input perturbation"))
    plain = (latents, noise, timesteps, tokens, *cond)
    expected, _ = diffusers_target(objective, plain)
    with torch.no_grad():
        theirs = F.mse_loss(output_of(objective, plain, seen), expected)
        assert objective(*batch).total.item() == pytest.approx(theirs.item(), rel=1e-5)


def half_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the images of folders masks: of even items the left half, of odd ones none."""
    original = ImageFolder.sample

    def view(self: ImageFolder, index: int, rng: Any) -> Sample:
        seen = original(self, index, rng)
        mask = Image.new("L", seen.image.size, 0)
        mask.paste(255, (0, 0, mask.width // 2, mask.height))
        return seen if index % 2 else seen._replace(mask=mask)

    monkeypatch.setattr(ImageFolder, "sample", view)


def test_the_error_counts_within_the_mask(recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch):
    half_masked(monkeypatch)
    objective = build(recipe, "task.loss.masked=true")
    plan = plan_for(objective)
    *plain, mask = objective.batch(plan)[:5]
    cond = objective.batch(plan)[5:]
    assert mask.shape == (8, 1, *plain[0].shape[2:])
    expected, _ = diffusers_target(objective, (*plain, *cond))
    with torch.no_grad():
        squares = (output_of(objective, (*plain, *cond), plain[1]) - expected).square()
        ours = objective(*objective.batch(plan)).total
    side = squares.shape[3] // 2
    rows = [
        row if item // objective.task.views_per_image % 2 else row[:, :, :side]
        for row, item in zip(squares, plan.items, strict=True)
    ]
    assert {row.shape[2] for row in rows} == {side, 2 * side}
    assert ours.item() == pytest.approx(torch.stack([row.mean() for row in rows]).mean().item(), rel=1e-5)


def test_masks_are_not_carried_unless_asked_for(recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch):
    plain = build(recipe)
    batch = plain.batch(plan_for(plain))
    half_masked(monkeypatch)
    again = build(recipe)
    for ours, theirs in zip(again.batch(plan_for(again)), batch, strict=True):
        assert torch.equal(ours, theirs)


def test_masks_that_are_not_there_are_missed(text_to_image_recipe: MakeRecipe):
    with pytest.raises(ConfigError, match="no image of the training set has a mask"):
        build(text_to_image_recipe, "task.loss.masked=true")


def test_a_mask_of_nothing_leaves_no_error_and_no_nan():
    scheduler = Scheduler(prediction_type="v_prediction")
    output, latents, noise = torch.randn(3, 2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    output.requires_grad_()
    level = scheduler.schedule.batch(torch.tensor([10, 900]))
    mask = torch.zeros(2, 1, 4, 4)
    mask[1] = 0.25
    errors = sample_errors(output, latents, noise, level, scheduler, LatentLoss(), mask)
    plain = sample_errors(output, latents, noise, level, scheduler, LatentLoss())
    assert errors[0] == 0
    torch.testing.assert_close(errors[1], plain[1])
    errors.sum().backward()
    assert output.grad is not None
    assert output.grad.isfinite().all()


def test_robust_errors_are_quadratic_near_and_linear_far():
    near, far = torch.tensor([1e-3, -1e-3]), torch.tensor([1e3, -1e3])
    zero = torch.zeros(2)
    for c in (0.1, 1.0):
        huber, smooth = (elementwise_error(near, zero, kind, c) for kind in ("huber", "smooth_l1"))
        torch.testing.assert_close(huber, near**2, rtol=1e-3, atol=0)
        torch.testing.assert_close(smooth, near**2 / c, rtol=1e-3, atol=0)
        huber, smooth = (elementwise_error(far, zero, kind, c) for kind in ("huber", "smooth_l1"))
        torch.testing.assert_close(huber, 2 * c * far.abs(), rtol=2e-3, atol=0)
        torch.testing.assert_close(smooth, 2 * far.abs(), rtol=2e-3, atol=0)
    assert torch.equal(elementwise_error(far, near, "l2", 0.1), (far - near) ** 2)


def test_a_recipe_with_everything_learns_and_resumes(
    text_to_image_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
):
    half_masked(monkeypatch)
    everything = (
        MIN_SNR,
        ZERO_SNR,
        "task.loss.kind=huber",
        "task.loss.offset_noise=0.05",
        "task.loss.pyramid_noise={}",
        "task.loss.input_perturbation=0.1",
        "task.loss.masked=true",
    )
    train(text_to_image_recipe(*everything, "max_steps=2"))
    config = text_to_image_recipe(*everything, "max_steps=30", "resume=true")
    train(config)
    rows = (config.output_dir / "log.jsonl").read_text("utf-8").splitlines()
    losses = [json.loads(row)["loss"] for row in rows]
    assert len(losses) == 30
    assert sum(losses[-6:]) < 0.9 * sum(losses[:6])


def plan_of(samples: int, *, step: int = 0) -> BatchIndices:
    (plan,) = plan_step(
        3, step, batch_size=samples, order=BucketSampler([range(9)]), parts=1, rank=0, processes=1
    )
    return plan


@pytest.mark.parametrize("loss", NOISES, ids=str)
def test_each_sample_has_its_own_whatever_it_is_batched_with(loss: LatentLoss):
    whole = training_noise(plan_of(8), SHAPE, loss)
    for rank in (0, 1):
        (part,) = plan_step(
            3, 0, batch_size=8, order=BucketSampler([range(9)]), parts=1, rank=rank, processes=2
        )
        assert torch.equal(training_noise(part, SHAPE, loss), whole[rank::2])


def test_offset_noise_shifts_whole_channels():
    plan = plan_of(64)
    offset = training_noise(plan, SHAPE, LatentLoss(offset_noise=0.5)) - plan.noise(SHAPE, "noise")
    assert (offset - offset.mean(dim=(2, 3), keepdim=True)).abs().max() < 1e-6
    shifts = offset[:, :, 0, 0]
    assert shifts.std().item() == pytest.approx(0.5, rel=0.15)
    assert abs(shifts.mean().item()) < 0.1
    assert len(set(shifts.flatten().tolist())) == shifts.numel()


class Drawn(random.Random):
    """Gives the draws of another generator, and keeps them."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.ratios: list[float] = []

    def uniform(self, a: float, b: float) -> float:
        self.ratios.append(super().uniform(a, b))
        return self.ratios[-1]


def kohyas(
    noise: Tensor, ratios: list[float], generator: torch.Generator, iterations: int, discount: float
) -> Tensor:
    """The formula of sd-scripts' pyramid_noise_like for a batch of one, with these ratios."""
    b, c, w, h = noise.shape
    upsample = nn.Upsample(size=(w, h), mode="bilinear")
    for i in range(iterations):
        wn, hn = max(1, int(w / (ratios[i] ** i))), max(1, int(h / (ratios[i] ** i)))
        noise = noise + upsample(torch.randn(b, c, wn, hn, generator=generator)) * discount**i
        if wn == 1 or hn == 1:
            break
    return noise / noise.std()


@pytest.mark.parametrize(("iterations", "discount"), [(1, 0.4), (3, 0.9), (16, 0.4)])
@pytest.mark.parametrize("shape", [(4, 64, 48), (4, 8, 8), (3, 1, 1)])
def test_pyramid_noise_is_kohyas(iterations: int, discount: float, shape: tuple[int, ...]):
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    rng = Drawn(5)
    ours = pyramid_noise(noise, PyramidNoise(iterations=iterations, discount=discount), rng)
    generator = torch.Generator().manual_seed(random.Random(5).getrandbits(63))
    theirs = kohyas(noise[None], rng.ratios, generator, iterations, discount)[0]
    torch.testing.assert_close(ours, theirs)
    assert all(2 <= ratio <= 4 for ratio in rng.ratios)
