"""What a run writes beside its checkpoints: whole or not there, and nothing left of what was not finished."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from latentgen.errors import OutputError
from latentgen.train import run_files
from latentgen.train.run_files import (
    LOG,
    append_row,
    delete_unfinished,
    discard,
    replaced_folder,
    sync_log,
    trim_log,
)
from latentgen.train.run_folder import run_lock


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fill(folder: Path, text: str) -> None:
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "weights").write_text(text)


def test_rows_are_added(tmp_path: Path):
    sync_log(tmp_path)  # of no rows yet
    for step in (1, 2):
        append_row(tmp_path, {"step": step, "loss": 0.5})
    sync_log(tmp_path)
    rows = (tmp_path / LOG).read_text("utf-8").splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2]


@pytest.mark.parametrize("write", [lambda folder: append_row(folder, {"step": 1}), sync_log])
def test_a_log_that_cannot_be_written(
    write: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    append_row(tmp_path, {"step": 0})
    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(OutputError, match=r"cannot write '.*log.jsonl': No space left.*checkpoint is intact"):
        write(tmp_path)


def test_a_row_of_which_a_part_was_written_is_dropped(tmp_path: Path):
    append_row(tmp_path, {"step": 1})
    with (tmp_path / LOG).open("ab") as file:
        file.write(b'{"step": 2, "lo\xff\x00')
    trim_log(tmp_path, 5)
    assert (tmp_path / LOG).read_text("utf-8") == '{"step": 1}\n'


def test_a_folder_takes_the_place_of_another(tmp_path: Path):
    for text in ("old", "new"):
        with replaced_folder(tmp_path / "model") as written:
            assert not (written / "unet").exists()
            fill(written, text)
    assert (tmp_path / "model" / "unet" / "weights").read_text() == "new"
    assert names(tmp_path) == ["model"]


def test_a_folder_that_was_not_finished_leaves_the_old_one(tmp_path: Path):
    fill(tmp_path / "model", "old")

    def fail() -> None:
        with replaced_folder(tmp_path / "model") as written:
            fill(written, "new")
            raise OutputError("the disk is full")

    with pytest.raises(OutputError, match="the disk is full"):
        fail()
    assert (tmp_path / "model" / "unet" / "weights").read_text() == "old"
    assert names(tmp_path) == ["model"]


def test_what_cannot_be_deleted_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def busy(path: Path) -> None:
        raise OSError(16, "Device or resource busy")

    fill(tmp_path / "checkpoint-00000001", "old")
    with monkeypatch.context() as patch:
        patch.setattr(run_files.shutil, "rmtree", busy)
        with pytest.warns(UserWarning, match="cannot be deleted: Device or resource busy"):
            discard(tmp_path / "checkpoint-00000001")
    assert not (tmp_path / "checkpoint-00000001").exists()
    (left,) = names(tmp_path)
    delete_unfinished(tmp_path)
    assert left.endswith(".tmp")
    assert names(tmp_path) == []


def test_the_next_process_deletes_what_was_not_finished(tmp_path: Path):
    fill(tmp_path / ".0123456789abcdef.tmp", "part of a checkpoint")
    (tmp_path / ".fedcba9876543210.tmp").write_text("part of a log")
    (tmp_path / ".mine.tmp").write_text("a user's")
    with run_lock(tmp_path, enabled=True):
        assert names(tmp_path) == [".lock", ".mine.tmp"]
