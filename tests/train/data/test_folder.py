"""Folders of images as people have them, and every problem of theirs in one report, before training begins."""

from __future__ import annotations

import csv
import json
import random
import re
from collections import Counter
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from latentgen.errors import DatasetError
from latentgen.train.config import FolderData, KohyaData
from latentgen.train.data.check import check
from latentgen.train.data.folder import ImageFolder
from tests.train.recipes import COLOURS


def open_folder(folder: Path, **fields: Any) -> ImageFolder:
    return ImageFolder(FolderData(**{"kind": "imagefolder", "path": folder, "image_size": 8} | fields))


def open_kohya(folder: Path, **fields: Any) -> ImageFolder:
    return ImageFolder(KohyaData(**{"kind": "kohya", "path": folder, "image_size": 8} | fields))


def problems_of(folder: Path, **fields: Any) -> str:
    with pytest.raises(DatasetError) as caught:
        open_folder(folder, **fields)
    return str(caught.value)


def write_metadata(folder: Path, *rows: Any) -> None:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", "utf-8")


def write_csv(folder: Path, *rows: tuple[str, ...]) -> None:
    with (folder / "metadata.csv").open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows(rows)


def draw(path: Path, width: int = 20, height: int = 10, colour: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), colour).save(path)
    return path


@pytest.fixture
def bare_folder(tmp_path: Path) -> Path:
    """Three pictures without captions: a.png, b.png, and sub/c.png."""
    folder = tmp_path / "pictures"
    for name in ("a.png", "b.png", "sub/c.png"):
        draw(folder / name)
    return folder


def test_captions_in_text_files(image_folder: Path):
    data = open_folder(image_folder)
    assert data.captions() == [f"{colour} disc" for colour in sorted(COLOURS)]
    view = data.sample(3, random.Random(0))
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
    with pytest.warns(UserWarning, match=r"metadata\.jsonl: .* more;"):
        assert open_folder(bare_folder).captions() == ["é 🍕", "two\u2028lines", ""]


def test_captions_in_tables(bare_folder: Path):
    """Of any column order, also in sub-folders, whose paths are relative to them."""
    write_csv(bare_folder, ("caption", "file_name"), ('said "é, 🍕"', "a.png"), ("two\nlines", "./b.png"))
    both = {"file_name": "c.png", "caption": "not this", "text": "third"}
    write_metadata(bare_folder / "sub", both)
    with pytest.warns(UserWarning, match=r"sub/metadata\.jsonl: .* caption;") as warned:
        assert open_folder(bare_folder, caption="x").captions() == ['said "é, 🍕"', "two\nlines", "third"]
    assert len(warned) == 1


def test_unknown_columns_are_a_warning(bare_folder: Path):
    """Captions under another name must not give way to the caption of all without a word."""
    rows = [{"file_name": name, "prompt": "lost", "source": "x"} for name in ("a.png", "b.png", "sub/c.png")]
    write_metadata(bare_folder, *rows)
    message = r"metadata\.jsonl: .* prompt; source;"
    with pytest.warns(UserWarning, match=message):
        assert open_folder(bare_folder, caption="x").captions() == ["x"] * 3
    notes = check(FolderData(kind="imagefolder", path=bare_folder, image_size=8, caption="x")).notes
    assert any(re.match(message, note) for note in notes)
    assert re.search(r"a\.png: no caption; .* text: prompt; source", problems_of(bare_folder))


def test_the_lines_of_a_text_file_are_captions_drawn_equally_often(bare_folder: Path):
    (bare_folder / "a.txt").write_text("\ufeffone\r\n\n  two  \nthree\u2028and more\n", "utf-8")
    (bare_folder / "b.txt").write_text("\n", "utf-8")
    (bare_folder / "sub" / "c.caption").write_text("kohya's suffix", "utf-8")
    data = open_folder(bare_folder)
    captions = data.sample(0, random.Random(0)).captions
    assert captions.texts == ("one", "two", "three\u2028and more")
    assert captions.weights == (1, 1, 1)
    assert data.captions()[3:] == ["", "kohya's suffix"]


def test_the_case_of_suffixes_does_not_matter(bare_folder: Path):
    (bare_folder / "a.png").rename(bare_folder / "a.PNG")
    for name, text in (
        ("a.TXT", "first"),
        ("b.Caption", "second"),
        ("sub/c.TXT", "not this"),
        ("sub/c.txt", "third"),
    ):
        (bare_folder / name).write_text(text, "utf-8")
    (bare_folder / "lonely.TXT").write_text("", "utf-8")
    assert open_folder(bare_folder).captions() == ["first", "second", "third"]
    notes = check(FolderData(kind="imagefolder", path=bare_folder, image_size=8)).notes
    assert any("lonely.TXT" in note for note in notes)


def test_one_caption_for_all_that_have_none_and_a_prefix_for_all(bare_folder: Path):
    (bare_folder / "b.txt").write_text("asleep", "utf-8")
    write_metadata(bare_folder, {"file_name": "sub/c.png"})
    data = open_folder(bare_folder, caption="a dog", caption_prefix="sks,", repeats=2)
    texts = ["sks, a dog"] * 2 + ["sks, asleep"] * 2 + ["sks, a dog"] * 2
    assert data.captions() == texts
    assert [data.sample(item, random.Random(0)).captions.texts[0] for item in range(6)] == texts


def test_captions_are_shuffled_as_in_kohyas_trainers(bare_folder: Path):
    fields = {"caption": "sks, dog , on a lawn,sunny, 4k", "caption_shuffle": True}
    captions = open_folder(bare_folder, keep_tokens=2, **fields).sample(0, random.Random(0)).captions
    drawn = Counter(captions.draw(random.Random(seed)) for seed in range(1200))
    orders = [", ".join(order) for order in permutations(["on a lawn", "sunny", "4k"])]
    assert drawn.keys() == {f"sks, dog, {order}" for order in orders}
    assert all(count / 1200 == pytest.approx(1 / 6, abs=0.05) for count in drawn.values())
    loose = open_folder(bare_folder, **fields).sample(0, random.Random(0)).captions
    assert len({loose.draw(random.Random(seed)) for seed in range(2000)}) == 120


def test_masks_and_edits_follow_the_image(tmp_path: Path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "after.png")
    Image.fromarray(pixels).save(tmp_path / "before.png")
    Image.fromarray(pixels[:, :, 0]).save(tmp_path / "mask.png")
    row = {"file_name": "after.png", "text": "make it red"}
    write_metadata(tmp_path, row | {"mask_file_name": "mask.png", "before_file_name": "before.png"})
    data = open_folder(tmp_path, image_size=24, crop="random", horizontal_flip=True)
    assert len(data) == 1, "what a row names beside the image is no image to learn"
    views = [data.sample(0, random.Random(seed)) for seed in range(8)]
    assert len({view.crop_corner for view in views}) > 3
    for view in views:
        assert view.before is not None
        assert view.mask is not None
        assert (view.mask.mode, view.mask.size, view.image.size) == ("L", (24, 24), (24, 24))
        np.testing.assert_array_equal(np.asarray(view.before), np.asarray(view.image))
        red = np.asarray(view.image)[:, :, 0].astype(float)
        assert np.corrcoef(red.ravel(), np.asarray(view.mask).ravel())[0, 1] > 0.9
        assert view.original_size == (30, 40)
    # A table that holds null or nothing for images without a mask.
    draw(tmp_path / "plain.png", 40, 30)
    write_metadata(tmp_path, row, {"file_name": "plain.png", "text": "x", "mask_file_name": None})
    (tmp_path / "before.png").unlink()
    (tmp_path / "mask.png").unlink()
    assert open_folder(tmp_path).sample(1, random.Random(0)).mask is None


def test_companions_must_be_of_one_size_and_edits_of_all_images(tmp_path: Path):
    for name, width in (("a.png", 20), ("b.png", 20), ("mask.png", 30), ("before.png", 20)):
        draw(tmp_path / name, width)
    rows = (("a.png", "x", "mask.png", ""), ("b.png", "y", "", "before.png"))
    write_csv(tmp_path, ("file_name", "text", "mask_file_name", "before_file_name"), *rows)
    message = problems_of(tmp_path)
    assert "2 problems" in message
    assert "mask.png is 30x10, and a.png is 20x10" in message
    assert "1 of 2 images have a before_file_name" in message


def test_buckets_by_ratio(tmp_path: Path):
    for name, size in (("lying", (300, 150)), ("square", (100, 104)), ("upright", (150, 300))):
        draw(tmp_path / f"{name}.png", *size)
    data = open_folder(tmp_path, caption="x", image_size=64, buckets=True, bucket_step=16)
    assert [data.bucket(index) for index in range(3)] == [(48, 80), (64, 64), (80, 48)]
    for index in range(3):
        assert data.sample(index, random.Random(0)).image.size == data.bucket(index)[::-1]
    with pytest.warns(UserWarning, match="1 of 3 images are smaller"):
        open_folder(tmp_path, caption="x", image_size=128)


def test_kohyas_folders(tmp_path: Path):
    draw(tmp_path / "10_sks dog" / "a.png")
    draw(tmp_path / "10_sks dog" / "deeper" / "b.jpg")
    draw(tmp_path / "1_a_dog" / "c.webp")
    (tmp_path / "10_sks dog" / "a.txt").write_text("sks dog asleep", "utf-8")
    data = open_kohya(tmp_path)
    assert Counter(data.captions()) == {"sks dog asleep": 10, "sks dog": 10, "a_dog": 1}
    draw(tmp_path / "log" / "stray.png")
    draw(tmp_path / "stray.png")
    draw(tmp_path / "0_none" / "d.png")
    with pytest.raises(DatasetError) as caught:
        open_kohya(tmp_path)
    message = str(caught.value)
    assert "3 problems" in message
    for name in ("log/stray.png", " stray.png", "0_none"):
        assert f"{name}: " in message


def test_every_problem_is_listed_at_once(bare_folder: Path):
    (bare_folder / "cut.png").write_bytes((bare_folder / "a.png").read_bytes()[:50])
    (bare_folder / "cut.txt").write_text("cut", "utf-8")
    (bare_folder / "latin.webp").write_bytes(b"")
    (bare_folder / "latin.txt").write_bytes(b"\xff\xfe")
    Image.new("RGB", (4, 4)).save(bare_folder.parent / "outside.png")
    (bare_folder / "link.png").symlink_to(bare_folder.parent / "outside.png")
    (bare_folder / "link.txt").write_text("one's own links are followed", "utf-8")
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
        {"file_name": None, "text": "null"},
        {"file_name": "sub\\c.png", "text": "backslash"},
        {"file_name": "sub/c.png\0", "text": "NUL"},
        {"file_name": "C:c.png", "text": "drive"},
        {"file_name": "link.png", "text": "a link of the metadata's"},
        {"file_name": "sub/c.png", "text": "x", "mask_file_name": "../outside.png"},
        {"file_name": "sub/c.png", "text": "x", "before_file_name": "none.png"},
        {"file_name": "sub/c.png", "text": "x", "mask_file_name": ["a.png"]},
        "[" * 100_000,
    )
    message = problems_of(bare_folder)
    assert "23 problems" in message
    for line in range(2, 21):
        assert f"metadata.jsonl line {line}:" in message
    for part in ("b.png: no caption", "latin.txt: ", "cut.png"):
        assert part in message
    assert "line 1:" not in message


def test_problems_of_a_table(bare_folder: Path):
    rows = (
        ("a.png", "x"),
        ("a.png", "y"),
        ("b.png",),
        ("sub/c.png", "x", "more"),
        ("", "x"),
        ("../x.png", "x"),
    )
    write_csv(bare_folder, ("file_name", "text"), *rows)
    message = problems_of(bare_folder)
    # Of b.png and sub/c.png nothing is known beside their rows, so they have no caption either.
    assert "7 problems" in message
    for line in range(3, 8):
        assert f"metadata.csv line {line}: " in message


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.csv", b"name,text\na.png,x\n"),
        ("metadata.csv", b"file_name,text,text\na.png,x,y\n"),
        ("metadata.csv", b""),
        ("metadata.csv", b'file_name,text\na.png,"never ended\n'),
        ("metadata.csv", b"\xff\xfe"),
        ("metadata.jsonl", b"\xff\xfe"),
    ],
)
def test_metadata_that_cannot_be_read(name: str, content: bytes, bare_folder: Path):
    (bare_folder / name).write_bytes(content)
    assert f"1 problems: {name} cannot be read" in problems_of(bare_folder, caption="x")


def truncated_jpeg(path: Path) -> None:
    draw(path, 64, 64)
    path.write_bytes(path.read_bytes()[:-200])


def bomb(path: Path) -> None:
    Image.new("1", (2**13 + 1, 2**13)).save(path)


@pytest.mark.parametrize(
    ("name", "spoil", "problem"),
    [
        ("cut.jpg", truncated_jpeg, "cannot be read"),
        ("empty.png", Path.touch, "empty"),
        ("page.jpg", lambda path: path.write_bytes(b"<!DOCTYPE html><p>404"), "HTML"),
        ("text.webp", lambda path: path.write_bytes(b"not an image"), "cannot be read"),
        ("bomb.png", bomb, "8193x8192 pixels"),
    ],
)
def test_bad_images_are_an_error_or_skipped_with_a_warning(
    name: str, spoil: Any, problem: str, image_folder: Path
):
    bad = image_folder / name
    spoil(bad)
    bad.with_suffix(".txt").write_text("bad", "utf-8")
    message = problems_of(image_folder)
    assert "has 1 problems: " in message
    assert name in message
    assert problem in message
    with pytest.warns(UserWarning, match=rf"1 images are left out: .*{name}"):
        data = open_folder(image_folder, on_bad_image="skip")
    assert len(data) == 6
    assert "bad" not in data.captions()


def test_an_image_with_a_bad_mask_is_left_out(tmp_path: Path):
    draw(tmp_path / "a.png")
    draw(tmp_path / "b.png")
    (tmp_path / "mask.png").touch()
    row = {"file_name": "a.png", "text": "x", "mask_file_name": "mask.png"}
    write_metadata(tmp_path, row, {"file_name": "b.png", "text": "y"})
    with pytest.warns(UserWarning, match=r"1 images are left out: .*mask\.png"):
        assert open_folder(tmp_path, on_bad_image="skip").captions() == ["y"]
    (tmp_path / "b.png").unlink()
    (tmp_path / "b.png").touch()
    with pytest.warns(UserWarning, match="2 images are left out"), pytest.raises(DatasetError):
        open_folder(tmp_path, on_bad_image="skip")


def test_images_of_all_kinds_are_read_upright_as_srgb(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter
    Image.new("RGB", (40, 20), "red").save(tmp_path / "rotated.jpg", exif=exif)
    Image.new("CMYK", (20, 40)).save(tmp_path / "cmyk.tif")
    Image.new("RGBA", (20, 40), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.fromarray(np.full((40, 20), 65535, np.uint16)).save(tmp_path / "sixteen.png")
    data = open_folder(tmp_path, caption="x", image_size=16, buckets=True, bucket_step=8)
    assert {data.bucket(index) for index in range(4)} == {(24, 8)}
    views = [data.sample(index, random.Random(0)) for index in range(4)]
    assert {view.original_size for view in views} == {(40, 20)}
    colours = [view.image.getpixel((4, 8)) for view in views]
    white = (255, 255, 255)
    assert colours == [white, white, (254, 0, 0), white]  # clear, cmyk, rotated (as JPEG has it), sixteen


def test_missing_captions_are_never_skipped(image_folder: Path):
    (image_folder / "red.txt").unlink()
    with pytest.raises(DatasetError, match=r"red\.png: no caption"):
        open_folder(image_folder, on_bad_image="skip")


def test_nothing_to_learn_from(tmp_path: Path):
    for open_set, folder, problem in (
        (open_folder, tmp_path, "no image"),
        (open_kohya, tmp_path, "no image"),
        (open_folder, tmp_path / "none", "not a folder"),
    ):
        with pytest.raises(DatasetError, match=problem):
            open_set(folder)


def test_links_to_folders_are_followed_once(bare_folder: Path, tmp_path: Path):
    draw(tmp_path / "elsewhere" / "d.png")
    (bare_folder / "linked").symlink_to(tmp_path / "elsewhere")
    (bare_folder / "sub" / "back").symlink_to(bare_folder)
    draw(bare_folder / ".thumbnails" / "e.png")
    draw(bare_folder / "._f.png")
    assert len(open_folder(bare_folder, caption="x")) == 4
