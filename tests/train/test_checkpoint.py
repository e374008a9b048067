"""Checkpoints of a run: complete or skipped, and never fewer than before."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from latentgen.errors import OutputError, ResumeError
from latentgen.train import checkpoint
from latentgen.train.checkpoint import MANIFEST, RunState, has_checkpoint, load_latest, save_checkpoint

FILES = ("weights.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json", MANIFEST)


def make_state(step: int) -> RunState:
    generator = torch.Generator().manual_seed(step)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return RunState(
        step=step,
        config={"seed": 3, "task": {"kind": "autoencoder", "betas": [0.9, 0.99]}},
        weights={"a.weight": draw(4, 3, 3, 3).to(memory_format=torch.channels_last), "a.bias": draw(4)},
        ema={"a.weight": draw(4, 3, 3, 3), "a.bias": draw(4)},
        optimizer={"0.step": torch.tensor(float(step)), "0.exp_avg": draw(4, 27)},
        scaler={},
    )


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in folder.glob("checkpoint-*"))


def assert_same(actual: RunState, expected: RunState) -> None:
    assert (actual.step, actual.config, actual.scaler) == (expected.step, expected.config, expected.scaler)
    for name in ("weights", "ema", "optimizer"):
        ours, theirs = getattr(actual, name), getattr(expected, name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_round_trip(tmp_path: Path):
    folder = save_checkpoint(tmp_path, make_state(120), keep=2)
    assert folder.name == "checkpoint-00000120"
    assert sorted(file.name for file in folder.iterdir()) == sorted(FILES)
    assert_same(load_latest(tmp_path), make_state(120))


def test_the_newest_is_loaded(tmp_path: Path):
    for step in (9, 10, 100_000_000):
        save_checkpoint(tmp_path, make_state(step), keep=9)
        assert load_latest(tmp_path).step == step


def test_the_oldest_are_deleted(tmp_path: Path):
    for step in range(1, 6):
        save_checkpoint(tmp_path, make_state(step), keep=2)
    assert steps(tmp_path) == [4, 5]


def delete(file: Path) -> None:
    file.unlink()


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def empty(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize("damage", [delete, truncate, flip_a_bit, empty])
@pytest.mark.parametrize("name", FILES)
def test_damaged_checkpoints_are_skipped(name: str, damage: Callable[[Path], None], tmp_path: Path):
    save_checkpoint(tmp_path, make_state(1), keep=9)
    damage(save_checkpoint(tmp_path, make_state(2), keep=9) / name)
    with pytest.warns(UserWarning, match="checkpoint-00000002.* is damaged"):
        state = load_latest(tmp_path)
    assert_same(state, make_state(1))


def test_an_empty_manifest_is_damaged(tmp_path: Path):
    (save_checkpoint(tmp_path, make_state(1), keep=1) / MANIFEST).write_text("{}")
    with pytest.warns(UserWarning, match="checkpoint-00000001"), pytest.raises(ResumeError):
        load_latest(tmp_path)


def test_nothing_to_resume(tmp_path: Path):
    assert not has_checkpoint(tmp_path / "none")
    for folder in (tmp_path / "none", tmp_path):
        with pytest.raises(ResumeError, match=re.escape(folder.name)):
            load_latest(folder)


def test_a_full_disk_keeps_the_old_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save_checkpoint(tmp_path, make_state(1), keep=1)
    save_weights = checkpoint.save_weights

    def full_at_the_optimizer(
        state: dict[str, Tensor], folder: Path, stem: str, *, max_shard_bytes: int
    ) -> None:
        if stem == "optimizer":
            raise OutputError("no space left on device")
        save_weights(state, folder, stem, max_shard_bytes=max_shard_bytes)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_weights", full_at_the_optimizer)
        with pytest.raises(OutputError):
            save_checkpoint(tmp_path, make_state(2), keep=1)
    assert steps(tmp_path) == [1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-00000001"]
    assert_same(load_latest(tmp_path), make_state(1))
    save_checkpoint(tmp_path, make_state(2), keep=1)
    assert_same(load_latest(tmp_path), make_state(2))
    assert steps(tmp_path) == [2]


def test_a_checkpoint_that_does_not_read_back_deletes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    save_checkpoint(tmp_path, make_state(1), keep=1)
    sha256 = checkpoint._sha256
    seen: set[Path] = set()

    def rotten(file: Path) -> str:
        again = file in seen
        seen.add(file)
        return "0" * 64 if again and file.name == "ema.safetensors" else sha256(file)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_sha256", rotten)
        with pytest.raises(OutputError, match="does not read back"):
            save_checkpoint(tmp_path, make_state(2), keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-00000001"]


def test_damaged_checkpoints_of_later_steps_are_deleted_first(tmp_path: Path):
    """A run that skipped step 30 and resumed from step 10 must not treat 30 as its newest."""
    save_checkpoint(tmp_path, make_state(10), keep=9)
    flip_a_bit(save_checkpoint(tmp_path, make_state(30), keep=9) / "weights.safetensors")
    save_checkpoint(tmp_path, make_state(20), keep=1)
    assert steps(tmp_path) == [20]
    assert load_latest(tmp_path).step == 20


def test_large_weights_stay_in_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(checkpoint.save_weights.__kwdefaults__, "max_shard_bytes", 16)
    save_checkpoint(tmp_path, make_state(1), keep=1)
    assert_same(load_latest(tmp_path), make_state(1))
