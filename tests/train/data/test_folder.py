"""Image folders: every problem in one report, before training begins."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from latentgen.errors import DatasetError
from latentgen.train.config import FolderData
from latentgen.train.data.folder import ImageFolder


def open_folder(folder: Path, **fields: Any) -> ImageFolder:
    return ImageFolder(FolderData(kind="imagefolder", path=folder, image_size=8, **fields))


def write_metadata(folder: Path, *rows: Any) -> None:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", "utf-8")


@pytest.fixture
def bare_folder(tmp_path: Path) -> Path:
    """Three pictures without captions: a.png, b.png, and sub/c.png."""
    folder = tmp_path / "pictures"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.png", "b.png", "sub/c.png"):
        Image.new("RGB", (20, 10), "red").save(folder / name)
    return folder


def test_captions_in_text_files(image_folder: Path):
    data = open_folder(image_folder)
    assert len(data) == 6
    assert data.corpus() == ["black disc", "blue disc", "green disc", "red disc", "white disc", "yellow disc"]
    view = data.view(3, random.Random(0))
    assert view.captions.texts == ("red disc",)
    assert view.image.size == (8, 8)
    red, green, blue = view.image.split()
    assert red.getpixel((4, 4)) > 240
    assert green.getpixel((4, 4)) == blue.getpixel((4, 4)) < 15


def test_captions_in_metadata(bare_folder: Path):
    write_metadata(
        bare_folder,
        {"file_name": "b.png", "text": "two\u2028lines", "more": 1},
        "",
        {"file_name": "sub/c.png", "text": ""},
        {"file_name": "a.png", "text": "é 🍕"},
    )
    assert open_folder(bare_folder).corpus() == ["é 🍕", "two\u2028lines", ""]


def test_every_problem_is_listed_at_once(bare_folder: Path):
    (bare_folder / "cut.png").write_bytes((bare_folder / "a.png").read_bytes()[:50])
    (bare_folder / "cut.txt").write_text("cut", "utf-8")
    (bare_folder / "latin.webp").write_bytes(b"")
    (bare_folder / "latin.txt").write_bytes(b"\xff\xfe")
    Image.new("RGB", (4, 4)).save(bare_folder.parent / "outside.png")
    write_metadata(
        bare_folder,
        {"file_name": "a.png", "text": "first"},
        {"file_name": "a.png", "text": "again"},
        {"file_name": "none.png", "text": "gone"},
        {"file_name": "sub/c.png", "text": None},
        {"file_name": "sub/c.png", "text": 3},
        {"file_name": "../outside.png", "text": "out"},
        {"file_name": str(bare_folder / "a.png"), "text": "absolute"},
        {"text": "nameless"},
        "{not json",
        "[1]",
        '{"file_name": "sub/c.png", "text": "half \\ud83c pair"}',
    )
    with pytest.raises(DatasetError) as caught:
        open_folder(bare_folder)
    message = str(caught.value)
    assert "13 problems" in message
    for line in range(2, 12):
        assert f"metadata.jsonl line {line}:" in message
    for part in (
        "has a row already",
        "'none.png' is not there",
        "b.png: no caption",
        "latin.txt:",
        "cut.png",
    ):
        assert part in message
    assert "line 1:" not in message


def test_bad_images_can_be_skipped_with_a_warning(image_folder: Path):
    (image_folder / "red.png").write_bytes(b"<html>")
    with pytest.raises(DatasetError, match=r"1 problems: .*red\.png"):
        open_folder(image_folder)
    with pytest.warns(UserWarning, match=r"1 images are left out: .*red\.png"):
        data = open_folder(image_folder, on_bad_image="skip")
    assert len(data) == 5
    assert "red disc" not in data.corpus()


def test_missing_captions_are_never_skipped(image_folder: Path):
    (image_folder / "red.txt").unlink()
    with pytest.raises(DatasetError, match=r"red\.png: no caption; write it into red\.txt"):
        open_folder(image_folder, on_bad_image="skip")


def test_nothing_to_learn_from(tmp_path: Path):
    with pytest.raises(DatasetError, match="no image that can be used"):
        open_folder(tmp_path)
    with pytest.raises(DatasetError, match="is not a folder of images"):
        open_folder(tmp_path / "none")


def test_metadata_that_is_not_text(bare_folder: Path):
    (bare_folder / "metadata.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(DatasetError, match=r"metadata\.jsonl cannot be read"):
        open_folder(bare_folder)
