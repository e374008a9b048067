"""The command that trains what a recipe describes; `python -m latentgen.train` is the same command."""

from __future__ import annotations

import json
import sys
from importlib.resources import files
from importlib.resources.abc import Traversable
from itertools import takewhile
from pathlib import Path
from typing import Annotated

import typer

from latentgen.cli.options import printable, train_extra
from latentgen.errors import InputError
from latentgen.files import quote

# Images of the fine-tuning recipes, relative to the root of the repository.
_OWN_IMAGES = "configs/train/crests"
_RECIPES = files("latentgen.configs") / "train"


def train(
    recipe: Annotated[
        Path | None,
        typer.Argument(metavar="RECIPE", help="A YAML file; unknown keys fail."),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Replace a field, such as a.b=YAML; repeatable."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Run a few steps, report the run's duration, and write nothing."),
    ] = False,
    list_recipes: Annotated[
        bool, typer.Option("--list-recipes", help="List the recipes inside the package, and exit.")
    ] = False,
    example: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Print one of these recipes, and exit."),
    ] = None,
) -> None:
    """Train by RECIPE; needs pip install 'latentgen[train]'.

    \b
    latentgen train --list-recipes
    latentgen train --example emoji_autoencoder > recipe.yaml
    latentgen train recipe.yaml --dry-run
    latentgen train recipe.yaml --set seed=1 --set optimizer.learning_rate=1e-4
    latentgen train recipe.yaml --set resume=true

    On several devices, or with the settings of `accelerate config`:

    \b
    accelerate launch -m latentgen.train recipe.yaml

    The first Ctrl-C or SIGTERM ends the run after the current step, with a checkpoint; --set resume=true resumes from
    it. Example recipes are also in configs/train/ of the repository. Prints the folder of the finished model.
    """
    if list_recipes:
        print(*_listing(), sep="\n")
        return
    if example is not None:
        print(_example(example), end="")
        return
    if recipe is None:
        raise InputError("RECIPE is missing: give a YAML file; latentgen train --list-recipes lists examples")
    with train_extra():
        _run(recipe, overrides or [], is_dry_run=dry_run)


def _run(recipe: Path, overrides: list[str], *, is_dry_run: bool) -> None:
    from accelerate import PartialState

    from latentgen.train import trainer
    from latentgen.train.config import load_config

    config = load_config(recipe, overrides)
    if is_dry_run:
        from latentgen.train.dry_run import dry_run

        lines = dry_run(config).lines()
    else:
        try:
            lines = iter([f"the model is in {trainer.train(config)}"])
        except KeyboardInterrupt:
            print("latentgen: interrupted; the last checkpoint is intact", file=sys.stderr)
            raise
        except SystemExit:
            if PartialState().is_main_process:
                message = "stopped after saving a checkpoint; --set resume=true resumes from it"
                print(f"latentgen: {message}", file=sys.stderr)
            raise
    if PartialState().is_main_process:
        for line in lines:
            print(printable(line))


def _listing() -> list[str]:
    """Each recipe with the first sentence of its comment."""
    recipes = _recipes()
    width = max(map(len, recipes))
    lines = []
    for name, text in recipes.items():
        comment = takewhile(lambda line: line.startswith("#"), text.splitlines())
        sentence = " ".join(line.lstrip("# ") for line in comment).partition(". ")[0].rstrip(".")
        lines.append(f"{name:{width}}  {sentence}")
    return lines


def _example(name: str) -> str:
    recipes = _recipes()
    if name not in recipes:
        raise InputError(f"--example {quote(name)}: no such recipe; choose from {', '.join(recipes)}")
    return _with_own_images(recipes[name], _RECIPES)


def _with_own_images(recipe: str, folder: Traversable) -> str:
    """The recipe with the path of its example images: unchanged where that path is right, else absolute."""
    if not isinstance(folder, Path) or Path(_OWN_IMAGES).resolve() == (folder / "crests").resolve():
        return recipe
    # Quoted: a path may hold YAML syntax.
    return recipe.replace(f"path: {_OWN_IMAGES},", f"path: {json.dumps(str(folder / 'crests'))},")


def _recipes() -> dict[str, str]:
    """The text of each recipe, by name."""
    paths = sorted(_RECIPES.iterdir(), key=lambda path: path.name)
    return {p.name.removesuffix(".yaml"): p.read_text("utf-8") for p in paths if p.name.endswith(".yaml")}


COMMANDS = (train,)
