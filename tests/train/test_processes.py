"""Runs in several processes (gloo, on the CPU): the same global batches, losses and weights as in one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from accelerate import Accelerator

from latentgen.errors import ResumeError
from latentgen.train.checkpoint import load_latest
from latentgen.train.config import TrainConfig
from latentgen.train.distributed import check_same_start
from latentgen.train.trainer import train
from tests.train.recipes import MakeRecipe
from tests.train.runs import losses_of, rows_of, wait_for_log

ROOT = Path(__file__).parents[2]
# AdamW of the same rate in all: torch's Muon makes more of the roundings.
COMMON = ("optimizer.name=adamw", "optimizer.learning_rate=0.001", "checkpoint_every=1000")
NOT_SHARDED: Mapping[str, str] = {}
# As `accelerate launch` sets them from its configuration.
SHARDED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "NO_WRAP",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
# AdamW's steps have the same size where the gradient is only rounding errors, as for the biases of attention's keys.
GRADIENT_FLOOR = 1e-4


class Job(NamedTuple):
    """A run: its number of processes, overrides of its recipe, and sharding as `accelerate launch` sets it."""

    processes: int
    overrides: Sequence[str]
    sharding: Mapping[str, str] = NOT_SHARDED


@contextmanager
def launched(tmp_path: Path, *jobs: Job) -> Iterator[subprocess.Popen[str]]:
    """See tests/train/launch.py."""
    described = [
        {
            "processes": job.processes,
            "arguments": [
                str(tmp_path / "recipe.yaml"),
                *(part for override in job.overrides for part in ("--set", override)),
            ],
            "sharding": dict(job.sharding),
        }
        for job in jobs
    ]
    (tmp_path / "jobs.json").write_text(json.dumps(described), "utf-8")
    with (tmp_path / "stderr").open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.train.launch", str(tmp_path / "jobs.json")],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
        with process:
            yield process


def line_of(process: subprocess.Popen[str], tmp_path: Path) -> list[int]:
    """The next line of the launcher: process ids or exit codes."""
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, (tmp_path / "stderr").read_text("utf-8")[-3000:]
    return json.loads(line)


def run_all(tmp_path: Path, *jobs: Job) -> str:
    """Run the jobs, all of which must succeed; returns their output."""
    with launched(tmp_path, *jobs) as process:
        for job in jobs:
            line_of(process, tmp_path)
            codes = line_of(process, tmp_path)
            assert codes == [0] * job.processes, (tmp_path / "stderr").read_text("utf-8")[-3000:]
    return (tmp_path / "stderr").read_text("utf-8")


def order_of(folder: Path) -> list[tuple[int, int, int]]:
    """Step, position in the global batch and item of every sample, whichever process had it."""
    rows: list[Any] = []
    for file in folder.glob("order-*.jsonl"):
        rows += map(json.loads, file.read_text("utf-8").splitlines())
    return sorted(
        (step, sample, item)
        for step, samples, items in rows
        for sample, item in zip(samples, items, strict=True)
    )


def assert_same_training(ours: Path, theirs: Path) -> None:
    """Losses and gradients' averages agree to 1e-5, and so do the weights that have a gradient."""
    assert order_of(ours) == order_of(theirs)
    one, other = load_latest(ours), load_latest(theirs)
    assert one.step == other.step
    assert one.weights.keys() == other.weights.keys()
    for index, (name, weight) in enumerate(other.weights.items()):
        average, square = (other.optimizer[f"{index}.{part}"] for part in ("exp_avg", "exp_avg_sq"))
        torch.testing.assert_close(one.optimizer[f"{index}.exp_avg"], average, rtol=1e-4, atol=1e-5)
        moved = square.sqrt() > GRADIENT_FLOOR
        torch.testing.assert_close(one.weights[name][moved], weight[moved], rtol=1e-5, atol=1e-5)


def test_two_processes_train_as_one(paired_recipe: MakeRecipe, tmp_path: Path):
    compare(paired_recipe, tmp_path, (1, 1), (2, 1))


def test_two_processes_share_a_cache_and_one_of_them_measures(paired_recipe: MakeRecipe, tmp_path: Path):
    measured = ("validation_fraction=0.34", "validation.loss_every=2", "max_steps=2", *COMMON)
    one = (*measured, f"task.cache_dir={tmp_path / 'cache-1'}", f"output_dir={tmp_path / 'one'}")
    two = (*measured, f"task.cache_dir={tmp_path / 'cache-2'}", f"output_dir={tmp_path / 'two'}")
    configs = [paired_recipe(*overrides) for overrides in (one, two)]
    run_all(tmp_path, Job(1, one), Job(2, two))
    expected, losses = map(rows_of, configs)
    assert "validation_loss" in expected[-1]
    for row, other in zip(losses, expected, strict=True):
        assert row == pytest.approx(other, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe", ["autoencoder_recipe", "text_to_image_recipe", "upscale_recipe", "paired_recipe"]
)
def test_the_batch_is_the_same_however_it_is_divided(
    recipe: str, request: pytest.FixtureRequest, tmp_path: Path
):
    make: MakeRecipe = request.getfixturevalue(recipe)
    compare(make, tmp_path, (1, 1), (1, 4), (2, 1), (2, 4), (4, 1), (4, 2))


def compare(make: MakeRecipe, tmp_path: Path, *divisions: tuple[int, int]) -> None:
    """Train in so many processes and accumulated parts each; all are compared with the first."""
    jobs = []
    configs: list[TrainConfig] = []
    for processes, parts in divisions:
        overrides = (
            *COMMON,
            "batch_size=8",
            f"gradient_accumulation_steps={parts}",
            f"output_dir={tmp_path / f'{processes}x{parts}'}",
        )
        configs.append(make(*overrides))
        jobs.append(Job(processes, overrides))
    run_all(tmp_path, *jobs)
    first, *others = configs
    assert len(order_of(first.output_dir)) == 4 * 8
    for config in others:
        assert losses_of(config) == pytest.approx(losses_of(first), rel=1e-5)
        noisy = [[row.get("noisy half", 0.0) for row in rows_of(run)] for run in (config, first)]
        assert noisy[0] == pytest.approx(noisy[1], rel=1e-4)
        assert_same_training(config.output_dir, first.output_dir)


def test_a_signal_to_one_process_stops_all_with_one_checkpoint(
    autoencoder_recipe: MakeRecipe, tmp_path: Path
):
    overrides = (*COMMON, "max_steps=100000", "workers=1")
    config = autoencoder_recipe(*overrides)
    with launched(tmp_path, Job(2, overrides)) as process:
        children = line_of(process, tmp_path)
        wait_for_log(config, process)
        os.kill(children[1], signal.SIGTERM)
        assert line_of(process, tmp_path) == [143, 143]
    state = load_latest(config.output_dir)
    assert state.processes == 2
    assert state.step == rows_of(config)[-1]["step"]
    assert len(list(config.output_dir.glob("checkpoint-*"))) == 1
    # It can be resumed in a single process, which warns.
    alone = autoencoder_recipe(*COMMON, f"max_steps={state.step + 2}", "resume=latest")
    with pytest.warns(UserWarning, match="the run used 2 processes and continues with 1"):
        train(alone)
    assert load_latest(alone.output_dir).step == state.step + 2


def test_a_process_does_not_wait_for_one_that_was_killed(autoencoder_recipe: MakeRecipe, tmp_path: Path):
    overrides = (*COMMON, "max_steps=100000")
    config = autoencoder_recipe(*overrides)
    with launched(tmp_path, Job(2, overrides)) as process:
        children = line_of(process, tmp_path)
        wait_for_log(config, process)
        os.kill(children[1], signal.SIGKILL)
        killed = time.monotonic()
        code, killed_code = line_of(process, tmp_path)
        assert time.monotonic() - killed < 60
    assert killed_code == -signal.SIGKILL
    assert code == 2, (tmp_path / "stderr").read_text("utf-8")[-3000:]
    assert "latentgen: error: another process of this run ended" in (tmp_path / "stderr").read_text("utf-8")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "reshard"),
    [("text_to_image_recipe", "true"), ("paired_recipe", "true"), ("text_to_image_recipe", "false")],
)
def test_sharded_weights_are_trained_saved_and_resumed(
    recipe: str, reshard: str, request: pytest.FixtureRequest, tmp_path: Path
):
    """In two processes, resumed in two, and once more in one that has all weights: as in one from the beginning."""
    make: MakeRecipe = request.getfixturevalue(recipe)
    sharding = SHARDED | {"FSDP_RESHARD_AFTER_FORWARD": reshard}
    # A rate that does not fall towards an end, which each part of the run would have elsewhere.
    rates = ["optimizer.decay_fraction=0"]
    if recipe == "text_to_image_recipe":
        rates.append("optimizer.text_encoder_learning_rate=0.0005")
    common = (*COMMON, *rates, "batch_size=8", "gradient_accumulation_steps=2")
    alone, spread = tmp_path / "alone", tmp_path / "spread"
    ours, theirs = (make(f"output_dir={folder}") for folder in (spread, alone))
    run_all(tmp_path, Job(1, (*common, "max_steps=6", f"output_dir={alone}")))
    on = (*common, f"output_dir={spread}", "resume=auto")
    run_all(tmp_path, *(Job(2, (*on, f"max_steps={steps}"), sharding) for steps in (2, 4)))
    assert load_latest(spread).step == 4
    output = run_all(tmp_path, Job(1, (*on, "max_steps=6")))
    assert "2 processes and continues with 1" in output
    assert losses_of(ours) == pytest.approx(losses_of(theirs), rel=1e-5)
    assert_same_training(spread, alone)


def test_processes_that_do_not_share_the_folder_are_refused(autoencoder_recipe: MakeRecipe, tmp_path: Path):
    """As on two machines, each with its own disk."""

    class Two(Accelerator):
        num_processes = 2  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]

        def gather(self, tensor: Any) -> Any:
            return torch.cat([tensor, torch.tensor([7])])

    with pytest.raises(ResumeError, match=r"different checkpoints in output_dir"):
        check_same_start(Two(cpu=True), None, tmp_path)
