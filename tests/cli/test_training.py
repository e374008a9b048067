"""`latentgen train`: one command with `python -m latentgen.train`."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from latentgen import cli
from latentgen.cli.training import _with_own_images
from latentgen.train.config import load_config
from tests.train.conftest import autoencoder_recipe, image_folder  # noqa: F401
from tests.train.recipes import MakeRecipe

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path.stem for path in (ROOT / "configs" / "train").glob("*.yaml"))


def test_the_recipes_are_listed(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["train", "--list-recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == RECIPES
    assert lines[0].endswith("64x64 emoji to 16x16x4 latents")


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_printed_unchanged(name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert cli.main(["train", "--example", name]) == 0
    text = capsys.readouterr().out
    assert text == (ROOT / "configs" / "train" / f"{name}.yaml").read_text("utf-8")
    (tmp_path / "mine.yaml").write_text(text, "utf-8")
    assert load_config(tmp_path / "mine.yaml", ["seed=3"]).seed == 3


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("finetune")])
def test_finetuning_recipes_find_their_images_from_any_folder(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "--example", name]) == 0
    (tmp_path / "mine.yaml").write_text(capsys.readouterr().out, "utf-8")
    actual, expected = load_config("mine.yaml"), load_config(ROOT / "configs" / "train" / f"{name}.yaml")
    assert actual.data.kind == expected.data.kind == "imagefolder"
    assert actual.data.path.is_dir()
    assert actual.data.path.samefile(ROOT / expected.data.path)
    data = expected.data.model_copy(update={"path": actual.data.path})
    assert actual == expected.model_copy(update={"data": data})


def test_a_path_of_any_name_is_written_so_that_it_is_read_again(tmp_path: Path):
    folder = tmp_path / "a: {b}, 'c' #\u00e9"
    text = _with_own_images("data: {path: configs/train/crests, image_size: 64}\n", folder)
    assert yaml.safe_load(text)["data"]["path"] == str(folder / "crests")


def test_the_recipes_are_in_the_wheel():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["latentgen.configs"]
    shipped = {path for pattern in patterns for path in (ROOT / "configs").glob(pattern)}
    assert {path for path in (ROOT / "configs").rglob("*") if path.is_file()} == shipped


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "RECIPE"),
        (["nowhere.yaml"], "nowhere.yaml cannot be read"),
        (["--example", "sdxl"], "no such recipe; choose from emoji_autoencoder"),
        (["recipe.yaml", "--set", "seed"], "--set takes key=value"),
        (["recipe.yaml", "--set", "bach_size=3"], "bach_size: Extra inputs"),
        (["recipe.yaml", "--dry-run", "--set", "data.path=nowhere"], "'nowhere' is not a folder of images"),
        (["recipe.yaml", "more"], "unexpected extra argument"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str],
    message: str,
    autoencoder_recipe: MakeRecipe,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    autoencoder_recipe()
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert printed.err.startswith("latentgen: error: ")
    assert message in printed.err
    assert not (tmp_path / "run").exists()


def test_dry_run_then_the_run(
    autoencoder_recipe: MakeRecipe,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
):
    config = autoencoder_recipe()
    recipe = str(tmp_path / "recipe.yaml")
    assert cli.main(["train", recipe, "--dry-run", "--set", "max_steps=1"]) == 0
    assert capsys.readouterr().out.startswith("dry run: autoencoder on ")
    assert not config.output_dir.exists()
    assert cli.main(["train", recipe, "--set", "max_steps=1"]) == 0
    assert capsys.readouterr().out == f"the model is in {config.output_dir / 'model'}\n"
    assert yaml.safe_load((config.output_dir / "model" / "README.md").read_text("utf-8").split("---")[1])
