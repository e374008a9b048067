"""The walks of docs/reading.md: anchors point at what they name, the walks are short, and a run takes them.

After lines have moved, `python -m tests.test_reading` rewrites the anchors and counts.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "reading.md"
# [`Class.method`](../folder/file.py#L1-L2)
ANCHOR = re.compile(r"\[`(?P<symbol>[\w.]+)`\]\(\.\./(?P<file>[\w/.]+)#L(?P<first>\d+)-L(?P<last>\d+)\)")
COUNT = re.compile(r"\*\*(?P<lines>[\d,]+) lines in (?P<files>\d+) files\*\*")
# Title of a walk -> at most so many lines, in so many files.
LIMITS = {"From a prompt to pixels": (2000, 12), "From a training batch to a weight": (1100, 8)}


def _walks(text: str) -> dict[str, str]:
    title_and_body = re.split(r"^## (.+)\n", text, flags=re.MULTILINE)[1:]
    return dict(zip(title_and_body[::2], title_and_body[1::2], strict=True))


def _definitions(file: str) -> dict[str, ast.FunctionDef | ast.ClassDef]:
    def named(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, ast.FunctionDef | ast.ClassDef]]:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                yield prefix + node.name, node
                yield from named(node.body, f"{prefix}{node.name}.")

    return dict(named(ast.parse((ROOT / file).read_text("utf-8")).body, ""))


def _lines_of(file: str, symbol: str) -> tuple[int, int]:
    """From the first decorator of what the symbol names to its last line."""
    node = _definitions(file)[symbol]
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    assert node.end_lineno is not None
    return first, node.end_lineno


def _size(walk: str) -> tuple[int, int]:
    """Lines that its anchors cover, each counted once, and their files."""
    covered = {
        (anchor["file"], line)
        for anchor in ANCHOR.finditer(walk)
        for line in range(int(anchor["first"]), int(anchor["last"]) + 1)
    }
    return len(covered), len({file for file, _ in covered})


def _updated(text: str) -> str:
    def anchored(anchor: re.Match[str]) -> str:
        first, last = _lines_of(anchor["file"], anchor["symbol"])
        return f"[`{anchor['symbol']}`](../{anchor['file']}#L{first}-L{last})"

    text = ANCHOR.sub(anchored, text)
    for walk in _walks(text).values():
        lines, files = _size(walk)
        text = text.replace(walk, COUNT.sub(f"**{lines:,} lines in {files} files**", walk))
    return text


def test_anchors_and_counts_are_true() -> None:
    text = PAGE.read_text("utf-8")
    assert text == _updated(text), "run: python -m tests.test_reading"


def test_every_link_to_code_is_an_anchor() -> None:
    text = PAGE.read_text("utf-8")
    assert len(re.findall(r"\]\([^)]*\.py", text)) == len(ANCHOR.findall(text))


@pytest.mark.parametrize("title", LIMITS)
def test_a_walk_is_short(title: str) -> None:
    lines, files = _size(_walks(PAGE.read_text("utf-8"))[title])
    most_lines, most_files = LIMITS[title]
    assert lines <= most_lines
    assert files <= most_files


def test_the_readme_gives_the_number() -> None:
    lines, _ = _size(_walks(PAGE.read_text("utf-8"))["From a prompt to pixels"])
    assert f"{lines:,} lines" in (ROOT / "README.md").read_text("utf-8")


def _executed(run: Callable[[], object]) -> set[CodeType]:
    seen: set[CodeType] = set()

    def profile(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            seen.add(frame.f_code)

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(before)
    return seen


def _assert_taken(title: str, executed: set[CodeType]) -> None:
    """Every function that the walk names ran; of a class at least one method did."""
    ran = {(str(Path(code.co_filename).resolve()), code.co_firstlineno) for code in executed}
    for anchor in ANCHOR.finditer(_walks(PAGE.read_text("utf-8"))[title]):
        file = str((ROOT / anchor["file"]).resolve())
        first, last = _lines_of(anchor["file"], anchor["symbol"])
        assert any(path == file and first <= line <= last for path, line in ran), anchor["symbol"]


def test_a_call_takes_the_walk_of_a_prompt() -> None:
    from latentgen import TextToImagePipeline

    pipeline = TextToImagePipeline.from_pretrained(dtype="float32", device="cpu")
    call = partial(pipeline, "tiger face", seed=7, num_inference_steps=2, scheduler="Euler", progress=False)
    _assert_taken("From a prompt to pixels", _executed(call))


def test_a_run_takes_the_walk_of_a_batch(tmp_path: Path) -> None:
    from latentgen.train.config import load_config
    from latentgen.train.trainer import train

    overrides = (
        f"output_dir={tmp_path / 'run'}",
        f"data.path={ROOT / 'configs' / 'train' / 'crests'}",
        "task.prior=null",
        "batch_size=2",
        "max_steps=1",
        "memory.planner=false",
    )
    config = load_config(ROOT / "configs" / "train" / "finetune_lora.yaml", overrides)
    _assert_taken("From a training batch to a weight", _executed(partial(train, config)))


if __name__ == "__main__":
    PAGE.write_text(_updated(PAGE.read_text("utf-8")), "utf-8")
