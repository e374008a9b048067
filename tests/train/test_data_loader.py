"""Batches from worker processes: those of this process bit for bit, and no process outlives its run."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Sequence

import pytest
import torch
from PIL import Image
from torch import Tensor

from latentgen.errors import ConfigError, DatasetError, InputError, LostProcessError
from latentgen.train import data_loader
from latentgen.train.data import BatchIndices, BucketSampler, Sample, plan_step
from latentgen.train.data_loader import load_batches
from latentgen.train.objectives import build_objective
from latentgen.train.objectives.base import Objective
from latentgen.train.objectives.latents import ViewEncoder, ViewSource
from tests.train.finetuning import Pictures
from tests.train.recipes import MakeRecipe

STEPS = 3
FRESH = ("task.views_per_image=0",)


class Counting(Objective):
    """Batches that name the process which made them; at `broken_step` that fails."""

    def __init__(self, broken_step: int = -1, *, kill: bool = False) -> None:
        super().__init__(Pictures())
        self.broken_step = broken_step
        self.kill = kill

    def batch(self, plan: BatchIndices, views: object = None) -> tuple[Tensor, ...]:
        if plan.step == self.broken_step:
            if self.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise DatasetError(f"image {plan.step} is gone")
        return torch.tensor([plan.step, os.getpid()]), plan.noise((3,), "noise")

    def forward(self, *batch: Tensor) -> None: ...  # pyright: ignore[reportIncompatibleMethodOverride]


def plans(steps: int = STEPS, parts: int = 2) -> Iterator[BatchIndices]:
    for step in range(steps):
        yield from plan_step(
            3, step, batch_size=4, order=BucketSampler([range(5)]), parts=parts, rank=0, processes=1
        )


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(
    ("fixture", "overrides"),
    [
        ("autoencoder_recipe", ()),
        ("text_to_image_recipe", ()),
        ("text_to_image_recipe", FRESH),
        ("paired_recipe", FRESH),
    ],
)
def test_workers_make_the_same_tensors(
    fixture: str, overrides: tuple[str, ...], request: pytest.FixtureRequest
):
    recipe: MakeRecipe = request.getfixturevalue(fixture)
    objective = build_objective(recipe(*overrides), device=torch.device("cpu"))
    here = [(plan, objective.batch(plan)) for plan in plans()]
    with load_batches(objective, plans(), workers=2, pin_memory=False) as prepared:
        there = list(prepared)
    assert [plan for plan, _ in there] == list(plans())
    for (_, ours), (_, theirs) in zip(here, there, strict=True):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert one.dtype == other.dtype
            assert one.stride() == other.stride()
            assert torch.equal(one, other)


def test_workers_draw_new_views_and_leave_the_autoencoder_to_the_parent(
    text_to_image_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
):
    # Where they can neither use an accelerator nor round as the parent does with all its threads.
    encoded = []
    encode = ViewEncoder.encode

    def encode_seen(self: ViewEncoder, images: Sequence[Image.Image]) -> list[Tensor]:
        encoded.append(os.getpid())
        return encode(self, images)

    def fresh_seen(self: ViewSource, plan: BatchIndices) -> list[Sample]:
        raise InputError(f"drawn by {os.getpid()}")

    objective = build_objective(text_to_image_recipe(*FRESH), device=torch.device("cpu"))
    monkeypatch.setattr(ViewEncoder, "encode", encode_seen)
    with load_batches(objective, plans(), workers=2, pin_memory=False) as prepared:
        count = len(list(prepared))
    assert encoded == [os.getpid()] * count
    monkeypatch.setattr(ViewSource, "views", fresh_seen)
    with (
        pytest.raises(InputError, match="drawn by") as caught,
        load_batches(objective, plans(), workers=1, pin_memory=False) as prepared,
    ):
        list(prepared)
    assert not str(caught.value).endswith(f" {os.getpid()}")


def test_every_worker_works_and_ends():
    with load_batches(Counting(), plans(9), workers=2, pin_memory=False) as prepared:
        makers = {int(tensors[0][1]) for _, tensors in prepared}
        assert len(makers) == 2
        assert os.getpid() not in makers
    assert not any(map(is_alive, makers))


def test_a_run_that_stops_early_leaves_no_process():
    makers: set[int] = set()

    def stop_at_the_second() -> None:
        with load_batches(Counting(), plans(1000), workers=2, pin_memory=False) as prepared:
            makers.update(int(next(prepared)[1][0][1]) for _ in range(2))
            raise SystemExit(143)

    with pytest.raises(SystemExit):
        stop_at_the_second()
    assert len(makers) == 2
    assert not any(map(is_alive, makers))


def test_errors_are_raised_as_they_are():
    with load_batches(Counting(1), plans(), workers=1, pin_memory=False) as prepared:
        assert [int(next(prepared)[1][0][0]) for _ in range(2)] == [0, 0]
        with pytest.raises(DatasetError, match=r"^image 1 is gone$"):
            next(prepared)


def test_a_worker_that_dies_is_named():
    started = time.monotonic()
    with (
        pytest.raises(LostProcessError, match="workers"),
        load_batches(Counting(1, kill=True), plans(), workers=1, pin_memory=False) as prepared,
    ):
        list(prepared)
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_workers_leave_signals_to_the_parent(number: int):
    with load_batches(Counting(), plans(100), workers=1, pin_memory=False) as prepared:
        maker = int(next(prepared)[1][0][1])
        os.kill(maker, number)
        assert len(list(prepared)) == 199
    assert not is_alive(maker)


def test_errors_of_the_block_pass_through():
    with (
        pytest.raises(RuntimeError, match=r"^the loss$"),
        load_batches(Counting(), plans(), workers=1, pin_memory=False),
    ):
        raise RuntimeError("the loss")


def test_a_system_that_cannot_fork_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(data_loader.multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    assert multiprocessing.get_all_start_methods() == ["spawn"]
    with (
        pytest.raises(ConfigError, match="workers is 2, but this system cannot fork"),
        load_batches(Counting(), plans(), workers=2, pin_memory=False),
    ):
        pass
