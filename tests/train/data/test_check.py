"""The report on a folder of images: complete, and in the words of those who made it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from latentgen.errors import DatasetError
from latentgen.train.config import FolderData, KohyaData
from latentgen.train.data.check import BucketCount, Report, check


def report(folder: Path, **fields: Any) -> Report:
    return check(FolderData(**{"kind": "imagefolder", "path": folder, "image_size": 16} | fields))


def test_a_folder_in_order(image_folder: Path):
    (image_folder / "red.txt").write_text("red disc\nround and red", "utf-8")
    assert report(image_folder, repeats=5) == Report(6, 7, {(16, 16): BucketCount(6, 30)}, [], [])


def test_problems_of_all_kinds_at_once(image_folder: Path):
    """An image without a caption, and one whose row has a problem, are decoded all the same."""
    for name in ("red", "green", "blue"):
        (image_folder / f"{name}.png").write_bytes(b"")
    (image_folder / "green.txt").unlink()
    (image_folder / "metadata.jsonl").write_text('{"file_name": "blue.png", "text": null}', "utf-8")
    found = report(image_folder)
    assert (found.images, found.captions) == (3, 3)
    assert len(found.problems) == 5
    names = ("metadata.jsonl line 1: text", "green.png: no caption", "blue.png", "green.png", "red.png")
    for name, problem in zip(names, found.problems, strict=True):
        assert name in problem


def test_notes(image_folder: Path):
    shutil.copy(image_folder / "red.png", image_folder / "twin.png")
    (image_folder / "twin.txt").write_text("", "utf-8")
    (image_folder / "lonely.txt").write_text("no image", "utf-8")
    (image_folder / "photo.HEIC").touch()
    (image_folder / "more.heic").touch()
    (image_folder / "LICENSE").touch()
    Image.new("RGB", (40, 20)).save(image_folder / "wide.png")
    (image_folder / "wide.txt").write_text("cat " * 75 + "\n" + "cat " * 76, "utf-8")
    frames = [Image.new("RGB", (24, 24), colour) for colour in ("red", "blue")]
    frames[0].save(image_folder / "moving.gif", save_all=True, append_images=frames[1:])
    (image_folder / "moving.txt").write_text("a change of colour", "utf-8")
    found = report(image_folder, image_size=24, buckets=True, bucket_step=8)
    assert not found.problems
    small = [note for note in found.notes if "smaller" in note]
    assert "black.png: 16x16 " in small[0]
    assert " 1.50" in small[0]
    assert len(small) == 7
    others = [note for note in found.notes if note not in small]
    for part, note in zip(
        (
            *("lonely.txt: ", ": 2 .heic, 1 without a suffix", "red.png: the same image as twin.png"),
            *(
                "moving.gif' is animated",
                "twin.png: its caption is empty",
                "wide.png: a caption of 76 tokens",
            ),
        ),
        others,
        strict=True,
    ):
        assert part in note
    assert found.buckets == {(16, 32): BucketCount(1, 1), (24, 24): BucketCount(8, 8)}


def test_kohyas_repeats_are_samples(tmp_path: Path, image_folder: Path):
    shutil.copytree(image_folder, tmp_path / "img" / "4_disc")
    found = check(KohyaData(kind="kohya", path=tmp_path / "img", image_size=16))
    assert found.buckets == {(16, 16): BucketCount(6, 24)}


def test_no_folder(tmp_path: Path):
    with pytest.raises(DatasetError, match="none"):
        report(tmp_path / "none")
