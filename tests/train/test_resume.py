"""A resumed run is the same run, bit for bit: weights, optimizer, moving average, order of samples and losses.

The full form cuts every kind of run at 40 steps and takes minutes: `pytest -m slow tests/train/test_resume.py`. There a
run that is resumed once is compared some steps later, or at its end if that is near.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from latentgen.train.config import TrainConfig
from latentgen.train.data import BatchIndices
from latentgen.train.objectives.base import Loss
from latentgen.train.trainer import Trainer, train
from tests.train.recipes import MakeRecipe
from tests.train.runs import assert_same_checkpoint, assert_same_model, copy_until, forget_accelerate, rows_of

IN_BACKWARD = ("optimizer.name=adafactor", "optimizer.step_in_backward=true", "optimizer.max_grad_norm=null")
# What is trained: a recipe of conftest.py, and what is set in it. Dropout draws from torch's generator.
RECIPES: dict[str, tuple[str, tuple[str, ...]]] = {
    "all weights": (
        "text_to_image_recipe",
        (
            "optimizer.name=muon",
            "optimizer.text_encoder_learning_rate=0.001",
            "task.text_encoder.attention_dropout=0.2",
        ),
    ),
    "some weights": ("paired_recipe", ("optimizer.name=adamw",)),
    "lora": ("lora_recipe", ("optimizer.name=adamw", "optimizer.text_encoder_learning_rate=0.001")),
    "autoencoder": ("autoencoder_recipe", ()),
    "buckets": ("bucket_recipe", ()),
    "upscaler": ("upscale_recipe", ()),
    "in backward": ("text_to_image_recipe", IN_BACKWARD),
    "no average": ("text_to_image_recipe", (*IN_BACKWARD, "ema_decay=0")),
}
IN_FULL = ("all weights", "some weights", "lora")
PRECISIONS = ("no", "bf16")
ACCUMULATIONS = (1, 4)
WORKERS = (0, 2)
# How far a run that is resumed once is followed in the full form.
AHEAD = 5


@dataclass
class Watch:
    """What runs train on, and the step after which SIGTERM reaches one."""

    order: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)
    stop_after: int | None = None

    def see(self, plan: BatchIndices) -> None:
        self.order.append((plan.step, plan.items))
        if self.stop_after == plan.step + 1:
            signal.raise_signal(signal.SIGTERM)
            self.stop_after = None  # the parts of a step that follow are not to get a second one


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    watch = Watch()
    original = Trainer._loss

    def loss(self: Trainer, plan: BatchIndices, batch: tuple[Tensor, ...]) -> Loss:
        watch.see(plan)
        return original(self, plan, batch)

    monkeypatch.setattr(Trainer, "_loss", loss)
    return watch


@pytest.fixture
def check(request: pytest.FixtureRequest, watch: Watch, tmp_path: Path) -> Check:
    """See Check."""
    return Check(request, watch, tmp_path)


@dataclass
class Check:
    """`check(kind, steps, splits)` runs a recipe without a stop, and again with stops after each of the splits.

    A resumed run continues to its end, or if it was resumed once and `ahead` is given, that many steps.
    """

    request: pytest.FixtureRequest
    watch: Watch
    scratch: Path

    def __call__(
        self,
        kind: tuple[str, str, int, int],
        steps: int,
        splits: Sequence[tuple[int, ...]],
        ahead: int | None = None,
    ) -> None:
        name, precision, parts, workers = kind
        fixture, overrides = RECIPES[name]
        recipe: MakeRecipe = self.request.getfixturevalue(fixture)
        common = (
            *overrides,
            f"mixed_precision={precision}",
            f"gradient_accumulation_steps={parts}",
            f"max_steps={steps}",
            f"workers={workers}",
        )
        whole = recipe(*common, f"output_dir={self.scratch / 'whole'}")
        forget_accelerate()
        train(whole)
        order = list(self.watch.order)
        assert len(order) == steps * parts
        cut = recipe(*common, f"output_dir={self.scratch / 'cut'}", "checkpoint_every=1000", "resume=latest")
        for stops in splits:
            copy_until(stops[0], whole, cut.output_dir)
            end = steps if ahead is None or len(stops) > 1 else min(stops[-1] + ahead, steps)
            resumed = self._order_of(cut, stops, None if end == steps else end)
            assert resumed == [row for row in order if stops[0] <= row[0] < end], stops
            assert rows_of(cut) == rows_of(whole)[:end], stops
            last = f"checkpoint-{end:08d}"
            assert_same_checkpoint(cut.output_dir / last, whole.output_dir / last)
            if end == steps:
                assert_same_model(cut.output_dir / "model", whole.output_dir / "model")

    def _order_of(
        self, config: TrainConfig, stops: Sequence[int], end: int | None
    ) -> list[tuple[int, tuple[int, ...]]]:
        """Resume at the first stop, and once more at each of the others; what was trained on meanwhile."""
        self.watch.order.clear()
        for start, stop in zip(stops, (*stops[1:], end), strict=True):
            forget_accelerate()
            torch.manual_seed(start)  # nothing may depend on what was drawn before
            self.watch.stop_after = stop
            if stop is None:
                train(config)
            else:
                with pytest.raises(SystemExit, match="143"):
                    train(config)
        return list(self.watch.order)


@pytest.mark.parametrize(
    "kind",
    [
        ("all weights", "bf16", 4, 2),
        ("all weights", "no", 1, 0),
        ("some weights", "no", 4, 0),
        ("lora", "bf16", 4, 2),
        ("autoencoder", "no", 2, 0),
        ("buckets", "no", 1, 0),
        ("upscaler", "no", 2, 0),
        ("in backward", "bf16", 1, 0),
        ("no average", "no", 1, 0),
    ],
    ids=str,
)
def test_a_resumed_run_is_the_same_run(kind: tuple[str, str, int, int], check: Check):
    check(kind, 5, [(2,), (4,)])


def test_three_resumes_in_a_row(check: Check):
    check(("all weights", "bf16", 1, 0), 6, [(1, 3, 4)])


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(product(IN_FULL, PRECISIONS, ACCUMULATIONS, WORKERS)), ids=str)
def test_at_forty_splits_and_three_in_a_row(kind: tuple[str, str, int, int], check: Check):
    check(kind, 41, [*((step,) for step in range(1, 41)), (7, 19, 33)], AHEAD)
