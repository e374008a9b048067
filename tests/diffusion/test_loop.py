"""The sampling loop as a whole: it never waits for the device, and a scheduler has no state to share."""

from __future__ import annotations

from collections import deque
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from latentgen.diffusion.guidance import ClassifierFree, Rescaled, guided
from latentgen.diffusion.schedule import NoiseLevel
from latentgen.diffusion.solver_names import SOLVER_TABLE, SolverName
from tests.diffusion.checkpoints import scheduler_named
from tests.diffusion.references import SHAPE, network

THREADS = 8


def predict(x: Tensor, level: NoiseLevel, rows: int) -> tuple[Tensor, ...]:
    return (network(x, level.timestep), torch.sin(x))[-rows:]


@pytest.mark.parametrize("solver", SOLVER_TABLE)
def test_the_loop_never_waits_for_the_device(solver: SolverName) -> None:
    """Tensors without values can be computed with, but whoever asks for one of their values is refused."""
    scheduler = scheduler_named(solver)
    levels = scheduler.levels(8)
    x = torch.empty(SHAPE, device="meta")
    with pytest.raises(RuntimeError):
        x.sum().item()
    denoiser = guided(
        lambda x, level, rows: (x, x * 2)[-rows:],
        scheduler.prediction_type,
        Rescaled(ClassifierFree(7.5), 0.7),
    )
    steps = list(
        scheduler.sample(denoiser, scheduler.initial(x, levels), levels, lambda: torch.empty_like(x))
    )
    assert len(steps) == 8
    assert steps[-1].latents.shape == SHAPE


@pytest.mark.parametrize("solver", SOLVER_TABLE)
def test_one_scheduler_serves_many_threads(solver: SolverName) -> None:
    scheduler = scheduler_named(solver)
    denoiser = guided(predict, scheduler.prediction_type, ClassifierFree(3.0))

    def run(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)

        def noise() -> Tensor:
            return torch.randn(SHAPE, generator=generator)

        levels = scheduler.levels(10 + seed)
        (last,) = deque(
            scheduler.sample(denoiser, scheduler.initial(noise(), levels), levels, noise), maxlen=1
        )
        return last.latents

    alone = [run(seed) for seed in range(THREADS)]
    with ThreadPoolExecutor(THREADS) as pool:
        together = list(pool.map(run, range(THREADS)))
    assert all(torch.equal(mine, other) for mine, other in zip(together, alone, strict=True))
