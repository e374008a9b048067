"""The kinds of noise: what they are made of, that each sample has its own, and what diffusers makes of it."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn

from latentgen.train.config import LatentLoss, PyramidNoise
from latentgen.train.data import BatchIndices, BucketSampler, plan_step
from latentgen.train.objectives.noise import perturbed_noise, pyramid_noise, training_noise

SHAPE = (4, 16, 16)
KINDS = [
    LatentLoss(),
    LatentLoss(offset_noise=0.1),
    LatentLoss(pyramid_noise=PyramidNoise()),
    LatentLoss(offset_noise=0.1, pyramid_noise=PyramidNoise(discount=0.8)),
]


def plan_of(samples: int, *, step: int = 0) -> BatchIndices:
    (plan,) = plan_step(
        3, step, batch_size=samples, order=BucketSampler([range(9)]), parts=1, rank=0, processes=1
    )
    return plan


def test_by_itself_it_is_the_noise_of_the_plan():
    plan = plan_of(4)
    assert torch.equal(training_noise(plan, SHAPE, LatentLoss()), plan.noise(SHAPE, "noise"))


@pytest.mark.parametrize("loss", KINDS, ids=str)
def test_each_sample_has_its_own_whatever_it_is_batched_with(loss: LatentLoss):
    whole = training_noise(plan_of(8), SHAPE, loss)
    for rank in (0, 1):
        (part,) = plan_step(
            3, 0, batch_size=8, order=BucketSampler([range(9)]), parts=1, rank=rank, processes=2
        )
        assert torch.equal(training_noise(part, SHAPE, loss), whole[rank::2])
        assert torch.equal(
            perturbed_noise(part, whole[rank::2], 0.1), perturbed_noise(plan_of(8), whole, 0.1)[rank::2]
        )


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


def test_pyramid_noise_has_unit_variance_and_more_of_what_is_large():
    plan = plan_of(32)
    plain = training_noise(plan, SHAPE, LatentLoss())
    coarse = training_noise(plan, SHAPE, LatentLoss(pyramid_noise=PyramidNoise(discount=0.8)))
    torch.testing.assert_close(coarse.std(dim=(1, 2, 3)), torch.ones(32))
    blocks = [noise.unfold(2, 8, 8).unfold(3, 8, 8).mean(dim=(-2, -1)).std() for noise in (plain, coarse)]
    assert blocks[1] > 3 * blocks[0]


def test_a_perturbed_input_is_noisier_by_its_strength():
    plan = plan_of(64)
    noise = plan.noise(SHAPE, "noise")
    added = perturbed_noise(plan, noise, 0.25) - noise
    assert added.std().item() == pytest.approx(0.25, rel=0.02)
    correlation = (added * noise).mean() / (added.std() * noise.std())
    assert abs(correlation.item()) < 0.02
