"""`latentgen check-data`: the whole report on stdout, one line on stderr if there are problems."""

from __future__ import annotations

import gzip
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import datasets
import pytest
from PIL import Image

from latentgen import cli


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, size in (("a", (32, 16)), ("b", (16, 16)), ("c", (16, 17))):
        Image.effect_noise(size, 90).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"picture {name}", "utf-8")
    return folder


def test_a_folder_in_order(pictures: Path, capsys: pytest.CaptureFixture[str]):
    options = ["--image-size", "16", "--buckets", "--bucket-step", "8"]
    assert cli.main(["check-data", str(pictures), *options]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    table = [line.split() for line in printed.out.splitlines()]
    assert table == [
        ["images:", "3,", "captions:", "3,", "samples", "of", "an", "epoch:", "3"],
        [],
        ["width", "x", "height", "images", "samples"],
        ["24", "x", "8", "1", "1"],
        ["16", "x", "16", "2", "2"],
        [],
        ["no", "problems"],
    ]


def test_the_bounds_of_buckets(pictures: Path, capsys: pytest.CaptureFixture[str]):
    options = ["--image-size", "16", "--buckets", "--bucket-step", "8"]
    assert cli.main(["check-data", str(pictures), *options, "--min-side", "16"]) == 0
    assert [line.split() for line in capsys.readouterr().out.splitlines()][3] == ["16", "x", "16", "3", "3"]
    for refused in ([*options, "--max-side", "8"], ["--max-side", "600"]):
        assert cli.main(["check-data", str(pictures), *refused]) == 2
        assert "max_side" in capsys.readouterr().err


def test_all_problems_are_listed_one_a_line(pictures: Path, capsys: pytest.CaptureFixture[str]):
    (pictures / "a.png").write_bytes(b"<html>404</html>")
    (pictures / "b.txt").unlink()
    (pictures / "evil\x1b[31m\n.png").touch()
    assert cli.main(["check-data", str(pictures), "--image-size", "20"]) == 2
    printed = capsys.readouterr()
    assert re.fullmatch(r"latentgen: error: [^\n]+fix the problems listed above\n", printed.err)
    assert "\x1b" not in printed.out
    lines = printed.out.splitlines()
    start = lines.index("problems: 4")
    assert len(lines) == start + 5
    for part in ("b.png: no caption", "a.png' is an HTML or XML page", r"evil\x1b[31m\n.png: no caption"):
        assert any(part in line for line in lines[start:])
    assert lines[lines.index("notes: 1") + 1].startswith("  c.png: 16x17 is smaller than 20x20")


def test_kohyas_folders(pictures: Path, capsys: pytest.CaptureFixture[str]):
    options = ["--image-size", "16", "--kind", "kohya"]
    assert cli.main(["check-data", str(pictures), *options]) == 2
    assert "a.png: not in a sub-folder named as in" in capsys.readouterr().out
    pictures.rename(pictures.parent / "10_cat")
    assert cli.main(["check-data", str(pictures.parent), *options]) == 0
    assert "samples of an epoch: 30" in capsys.readouterr().out


def packed(folder: Path, pictures: Path, captions: dict[str, str]) -> Path:
    """A tar file of the pictures with these captions."""
    folder.mkdir()
    with tarfile.open(folder / "part-000.tar", "w") as archive:
        for name, caption in captions.items():
            (pictures / f"{name}.txt").write_text(caption, "utf-8")
            for suffix in ("png", "txt"):
                archive.add(pictures / f"{name}.{suffix}", f"{name}.{suffix}")
    return folder


def test_shards_in_order(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = packed(tmp_path / "shards", pictures, {"a": "one", "b": "cat " * 76, "c": ""})
    options = ["--kind", "webdataset", "--image-size", "16", "--buckets", "--bucket-step", "8"]
    for name in (folder, folder / "part-{000..000}.tar"):
        assert cli.main(["check-data", str(name), *options]) == 0
        out = capsys.readouterr().out
        assert "images: 3, captions: 3, samples of an epoch: 3" in out
        assert "24 x 8" in out
        assert re.search(r"part-000\.tar, image at byte [\d,]+: a caption of 76 tokens", out)
        assert re.search(r"part-000\.tar, image at byte [\d,]+: its caption is empty", out)
        assert out.endswith("\nno problems\n")


def test_all_problems_of_shards(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (pictures / "a.png").write_bytes(b"<html>404</html>")
    folder = packed(tmp_path / "shards", pictures, {"a": "one", "b": "t\0wo", "c": "three"})
    with tarfile.open(folder / "part-001.tar", "w") as archive:
        archive.add(pictures / "b.png", "lonely.png")
        for number in range(60):
            archive.add(pictures / "b.txt", f"text-{number}.txt")
    (folder / "part-002.tar").write_bytes(gzip.compress(b"tar"))
    assert cli.main(["check-data", str(folder), "--kind", "webdataset", "--image-size", "16"]) == 2
    printed = capsys.readouterr()
    assert "fix the problems listed above" in printed.err
    assert "images: 1, captions: 1" in printed.out
    assert "problems: 64" in printed.out
    for part in (
        "part-000.tar, a.png",
        "'b.txt': ",
        "'lonely.png': no caption",
        "'text-59.txt': a caption without",
    ):
        assert part in printed.out
    assert "part-002.tar'" in printed.out


def test_a_data_set_in_order(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = {"image": [(pictures / f"{name}.png").read_bytes() for name in "abc"]}
    datasets.Dataset.from_dict(rows | {"text": ["one", "two", ""]}).save_to_disk(tmp_path / "set")
    assert cli.main(["check-data", str(tmp_path / "set"), "--kind", "huggingface", "--image-size", "16"]) == 0
    out = capsys.readouterr().out
    assert "images: 3, captions: 3, samples of an epoch: 3" in out
    assert "row 2: its caption is empty" in out
    assert out.endswith("\nno problems\n")


def test_all_problems_of_a_data_set(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    image = (pictures / "b.png").read_bytes()
    columns = {"picture": [image, b"no image", None, image], "words": ["one", "two", "three", None]}
    datasets.DatasetDict(
        {"train": datasets.Dataset.from_dict(columns), "test": datasets.Dataset.from_dict(columns)}
    ).save_to_disk(tmp_path / "set")
    command = ["check-data", str(tmp_path / "set"), "--kind", "huggingface", "--image-size", "16"]
    assert cli.main(command) == 2
    assert "data.split" in capsys.readouterr().err
    command += ["--split", "test", "--image-column", "picture", "--caption-column", "words"]
    assert cli.main(command) == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "images: 1, captions: 1, samples of an epoch: 1"
    start = lines.index("problems: 3")
    assert [line.split(":")[0] for line in lines[start + 1 :]] == ["  row 1", "  row 2", "  row 3"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--image-size", "4"], "image_size"),
        (["--buckets", "--bucket-step", "1024"], "1024"),
        (["--kind", "kohya", "--caption", "x"], "--caption"),
        (["--kind", "zip"], "'--kind'"),
        (["--split", "train"], "split"),
    ],
)
def test_options_that_do_not_fit(
    options: list[str], message: str, pictures: Path, capsys: pytest.CaptureFixture[str]
):
    assert cli.main(["check-data", str(pictures), *options]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.fullmatch(r"latentgen: error: [^\n]+\n", printed.err)
    assert message in printed.err


def test_a_missing_extra_is_named():
    code = "import sys; sys.modules['yaml'] = None; from latentgen.cli import main; sys.exit(main(['check-data', '.']))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 2
    assert "needs the module yaml: pip install 'latentgen[train]'" in ended.stderr
