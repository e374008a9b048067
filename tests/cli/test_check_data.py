"""`latentgen check-data`: the whole report on stdout, one line on stderr if there are problems."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

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


def test_all_problems_are_listed_one_a_line(pictures: Path, capsys: pytest.CaptureFixture[str]):
    (pictures / "a.png").write_bytes(b"<html>404</html>")
    (pictures / "b.txt").unlink()
    (pictures / "evil\x1b[31m\n.png").touch()
    assert cli.main(["check-data", str(pictures), "--image-size", "20"]) == 2
    printed = capsys.readouterr()
    assert re.fullmatch(r"latentgen: error: [^\n]+mend what is listed above\n", printed.err)
    assert "\x1b" not in printed.out
    lines = printed.out.splitlines()
    start = lines.index("problems: 4")
    assert len(lines) == start + 5
    for part in ("b.png: no caption", "a.png' is an HTML or XML page", r"evil\x1b[31m\n.png: no caption"):
        assert any(part in line for line in lines[start:])
    assert lines[lines.index("notes: 1") + 1].startswith("  c.png: 16x17 is smaller than its view of 20x20")


def test_a_caption_for_all(pictures: Path, capsys: pytest.CaptureFixture[str]):
    (pictures / "b.txt").unlink()
    options = ["--image-size", "16", "--caption", "a photo of sks dog"]
    assert cli.main(["check-data", str(pictures), *options]) == 0
    assert "captions: 3" in capsys.readouterr().out


def test_kohyas_folders(pictures: Path, capsys: pytest.CaptureFixture[str]):
    options = ["--image-size", "16", "--kind", "kohya"]
    assert cli.main(["check-data", str(pictures), *options]) == 2
    assert "a.png: not in a sub-folder named as in" in capsys.readouterr().out
    pictures.rename(pictures.parent / "10_cat")
    assert cli.main(["check-data", str(pictures.parent), *options]) == 0
    assert "samples of an epoch: 30" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--image-size", "4"], "image_size: Input should be greater than or equal to 8"),
        (["--buckets", "--bucket-step", "1024"], "makes a square of 0"),
        (["--kind", "kohya", "--caption", "x"], "--caption is for --kind imagefolder"),
        (["--kind", "zip"], "'--kind'"),
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


def test_no_folder(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["check-data", "nowhere/at/all"]) == 2
    assert "'nowhere/at/all' is not a folder of images" in capsys.readouterr().err


def test_help_teaches_by_example_and_imports_no_torch():
    code = (
        "import sys, latentgen.cli as cli; cli.main(['check-data', '-h']); sys.exit('torch' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert 'latentgen check-data pictures --caption "a photo of sks dog"' in shown
    assert '{"file_name": "cat.png", "text": "a cat on a sofa"}' in shown


def test_a_missing_extra_is_named():
    code = "import sys; sys.modules['yaml'] = None; from latentgen.cli import main; sys.exit(main(['check-data', '.']))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 2
    assert "check-data needs the module yaml: pip install 'latentgen[train]'" in ended.stderr
