"""The command `python -m latentgen.train`: one-line errors and exit codes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from latentgen.train import trainer
from latentgen.train.__main__ import main
from latentgen.train.config import TrainConfig
from tests.train.recipes import MakeRecipe


def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main([str(tmp_path / "none.yaml")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("latentgen: error: the recipe ")
    assert captured.err.count("\n") == 1


def test_a_missing_dependency_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setitem(sys.modules, "yaml", None)
    for module in [name for name in sys.modules if name.startswith("latentgen.train.config")]:
        monkeypatch.delitem(sys.modules, module)
    assert main(["recipe.yaml"]) == 2
    error = capsys.readouterr().err
    assert "module yaml" in error
    assert "latentgen[train]" in error
    assert error.count("\n") == 1


def test_ctrl_c(autoencoder_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def interrupted(config: TrainConfig) -> Path:
        raise KeyboardInterrupt

    autoencoder_recipe()
    monkeypatch.setattr(trainer, "train", interrupted)
    assert main([str(tmp_path / "recipe.yaml")]) == 130
