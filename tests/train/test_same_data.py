"""A resumed run uses the images and captions that it began with, or refuses."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from latentgen.errors import ResumeError
from latentgen.train.data import digest_of
from latentgen.train.dry_run import dry_run
from latentgen.train.trainer import train
from tests.train.recipes import MakeRecipe
from tests.train.runs import forget_accelerate


def _delete(folder: Path) -> None:
    (folder / "red.png").unlink()
    (folder / "red.txt").unlink()


def _rewrite(folder: Path) -> None:
    (folder / "red.txt").write_text("a ball", "utf-8")


def _repaint(folder: Path) -> None:
    Image.new("RGB", (16, 16), "red").save(folder / "red.png")


@pytest.mark.parametrize("change", [_delete, _rewrite, _repaint])
def test_other_images_or_captions_are_refused(
    change: Callable[[Path], None], autoencoder_recipe: MakeRecipe, image_folder: Path
):
    train(autoencoder_recipe("max_steps=1"))
    change(image_folder)
    forget_accelerate()
    resumed = ("resume=latest", "max_steps=2")
    changes = ("optimizer.learning_rate=0.01", "allow_changes=[optimizer]")
    with pytest.raises(ResumeError, match=r"allow_changes=\[optimizer, data\]"):
        train(autoencoder_recipe(*resumed, *changes))
    forget_accelerate()
    with pytest.raises(ResumeError, match="images or captions of data have changed"):
        dry_run(autoencoder_recipe(*resumed))
    forget_accelerate()
    with pytest.warns(UserWarning, match="images or captions of data have changed"):
        train(autoencoder_recipe(*resumed, "allow_changes=[data]"))
    forget_accelerate()
    train(autoencoder_recipe("resume=latest", "max_steps=3"))


def test_the_same_images_elsewhere_are_the_same(autoencoder_recipe: MakeRecipe, image_folder: Path):
    train(autoencoder_recipe("max_steps=1"))
    moved = image_folder.with_name("moved")
    shutil.copytree(image_folder, moved)
    forget_accelerate()
    train(autoencoder_recipe("resume=latest", f"data.path={moved}", "allow_changes=[data.path]"))


def test_digests_distinguish_their_parts():
    contents = [("ab", "c"), ("a", "bc"), ("abc",), (b"abc",), (("a", "b"), "c"), (1, 2), (12,), ()]
    assert len({digest_of(parts) for parts in contents}) == len(contents)
