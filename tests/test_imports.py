"""Imports point one way, and importing the package is cheap."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Part of the package -> its sources, and the other parts that it may import.
SOURCES = {
    "models": ROOT / "latentgen" / "models",
    "diffusion": ROOT / "latentgen" / "diffusion",
    "core": ROOT / "latentgen",
    "pipelines": ROOT / "pipelines",
    "train": ROOT / "train",
    "cli": ROOT / "latentgen" / "cli",
}
# Packages that are part of core.
CORE_PACKAGES = ("adapters", "checkpoints")
ALLOWED = {
    "models": {"core"},
    "diffusion": {"core"},
    "core": {"models", "diffusion"},
    "pipelines": {"core", "models", "diffusion"},
    "train": {"core", "models", "diffusion", "pipelines"},
    "cli": {"core", "models", "diffusion", "pipelines", "train"},
}
HEAVY = {"torch", "transformers", "diffusers", "numpy", "PIL", "accelerate", "safetensors"}


# Entry points of the command inside of other parts.
ENTRY_POINTS = {ROOT / "train" / "__main__.py": "cli"}


def _modules(part: str) -> list[Path]:
    entries = [path for path, of in ENTRY_POINTS.items() if of == part]
    return entries + [path for path in _sources(part) if path not in ENTRY_POINTS]


def _sources(part: str) -> list[Path]:
    if part == "core":
        # The facade names every public class; its imports are lazy, which the test of its cost holds.
        files = [path for path in SOURCES[part].glob("*.py") if path.name != "__init__.py"]
        return files + [path for name in CORE_PACKAGES for path in (SOURCES[part] / name).rglob("*.py")]
    return list(SOURCES[part].rglob("*.py"))


def _part_of(module: str) -> str:
    names = module.split(".")
    part = names[1] if len(names) > 1 else "core"
    return part if part in ALLOWED else "core"


def _imported(path: Path) -> Iterator[str]:
    """The modules of the package that a file imports anywhere, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, (
                f"{path}:{node.lineno} is a relative import, which the mapping of the package breaks"
            )
            # `from latentgen import pipelines` imports the module latentgen.pipelines.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] == "latentgen")


@pytest.mark.parametrize("part", ALLOWED)
def test_imports_point_one_way(part: str):
    modules = _modules(part)
    assert modules
    wrong = {
        f"{path.relative_to(ROOT)} imports {name}"
        for path in modules
        for name in _imported(path)
        if _part_of(name) not in {part, *ALLOWED[part]}
    }
    assert not wrong


def _fresh_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=True, env=environment, cwd=ROOT
    )


def _import_milliseconds(module: str) -> float:
    """The cumulative time of importing a module, the best of three fresh interpreters."""
    times = []
    for _ in range(3):
        report = _fresh_python("-X", "importtime", "-c", f"import {module}").stderr
        line = next(line for line in report.splitlines() if line.split("|")[-1].strip() == module)
        times.append(int(line.split("|")[1]) / 1000)
    return min(times)


@pytest.mark.parametrize("module", ["latentgen", "latentgen.cli"])
def test_importing_is_light(module: str):
    loaded = _fresh_python("-c", f"import {module}, sys; print(*sys.modules)").stdout.split()
    assert not {name.split(".")[0] for name in loaded} & HEAVY


def test_importing_takes_less_than_a_tenth_of_a_second():
    assert _import_milliseconds("latentgen") < 100
