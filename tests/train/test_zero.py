"""Runs with DeepSpeed in two processes (gloo, on the CPU). CI installs DeepSpeed for these; see docs/finetuning.md."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from latentgen.train.checkpoint import load_latest
from latentgen.train.trainer import train
from tests.train.recipes import MakeRecipe
from tests.train.runs import log_of
from tests.train.test_processes import (
    COMMON,
    Job,
    assert_same_training,
    launched,
    line_of,
    run_all,
    wait_for_steps,
)

pytest.importorskip(
    "deepspeed", reason="not installed: DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed"
)


def zero(stage: int) -> dict[str, str]:
    """As `accelerate launch` tells of it."""
    return {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)}


def test_both_stages_train_save_and_resume_as_one_process_does(
    text_to_image_recipe: MakeRecipe, tmp_path: Path
):
    # A norm that clips in every step; a rate that does not fall towards an end, which each run would have elsewhere.
    common = (
        *COMMON,
        "batch_size=8",
        "optimizer.max_grad_norm=0.2",
        "optimizer.decay_fraction=0",
        "resume=auto",
    )
    folders = {name: tmp_path / name for name in ("alone", "first", "second")}
    configs = {
        name: text_to_image_recipe(*common, f"output_dir={folder}") for name, folder in folders.items()
    }

    def until(step: int, name: str, *, parts: int, stage: int | None = None) -> Job:
        told = (f"output_dir={folders[name]}", f"max_steps={step}", f"gradient_accumulation_steps={parts}")
        change = "allow_changes=[gradient_accumulation_steps]"
        return Job(2 if stage else 1, (*common, *told, change), zero(stage) if stage else {})

    run_all(
        tmp_path,
        until(6, "alone", parts=1),
        until(2, "first", parts=1, stage=1),
        until(6, "first", parts=2, stage=1),
        until(2, "second", parts=1),
        until(4, "second", parts=2, stage=2),
        until(5, "second", parts=1, stage=2),
        until(6, "second", parts=1),
    )
    expected, saved = log_of(configs["alone"]), load_latest(folders["alone"])
    assert all(row["grad_norm"] > 0.2 for row in expected)
    assert [row["step"] for row in expected] == [1, 2, 3, 4, 5, 6]
    for name in ("first", "second"):
        for row, due in zip(log_of(configs[name]), expected, strict=True):
            assert row == pytest.approx(due, rel=1e-5)
        assert_same_training(folders[name], folders["alone"])
        state = load_latest(folders[name])
        assert {key: tuple(t.shape) for key, t in state.optimizer.items()} == {
            key: tuple(t.shape) for key, t in saved.optimizer.items()
        }
        # The first steps count little in an average that begins fast.
        for key, average in saved.ema.items():
            torch.testing.assert_close(state.ema[key], average, rtol=1e-4, atol=1e-4)
        for file in folders["alone"].glob("model/**/*.safetensors"):
            model = load_file(folders[name] / file.relative_to(folders["alone"]))
            torch.testing.assert_close(model, load_file(file), rtol=1e-4, atol=1e-4)


# As people have it, after the examples of Hugging Face.
CONFIGURATION = {
    "bf16": {"enabled": "auto"},
    "zero_optimization": {
        "stage": 2,
        "allgather_partitions": True,
        "allgather_bucket_size": 2e8,
        "overlap_comm": True,
        "reduce_scatter": True,
        "reduce_bucket_size": "auto",
        "contiguous_gradients": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}


def test_a_signal_stops_a_lora_in_bf16_which_goes_on_without_deepspeed(
    lora_recipe: MakeRecipe, tmp_path: Path
):
    overrides = (*COMMON, "mixed_precision=bf16", "memory.base_dtype=bf16", "workers=1")
    config = lora_recipe(*overrides, "max_steps=100000")
    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps(CONFIGURATION), "utf-8")
    asked = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}
    with launched(tmp_path, Job(2, (*overrides, "max_steps=100000"), asked)) as process:
        children = line_of(process, tmp_path)
        wait_for_steps(config, process)
        os.kill(children[1], signal.SIGTERM)
        assert line_of(process, tmp_path) == [143, 143], (tmp_path / "stderr").read_text("utf-8")[-3000:]
    state = load_latest(config.output_dir)
    assert {t.dtype for t in state.weights.values()} == {torch.float32}
    assert all("lora" in name for name in state.weights)
    alone = lora_recipe(*overrides, f"max_steps={state.step + 1}", "resume=latest")
    with pytest.warns(UserWarning, match="computed by 2 processes and goes on with 1"):
        train(alone)
    assert log_of(alone)[-1]["step"] == state.step + 1
