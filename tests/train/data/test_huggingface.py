"""Data sets of the datasets library on disk: what it wrote, read without the network; every problem at once."""

from __future__ import annotations

import json
import random
import socket
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from latentgen.errors import ConfigError, DatasetError, UnsafePathError
from latentgen.train.config import HuggingFaceData
from latentgen.train.data import open_data
from latentgen.train.data.huggingface import HuggingFaceSet
from latentgen.train.trainer import train
from tests.train.recipes import COLOURS, MakeRecipe, encoded


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")


def table(**columns: Any) -> datasets.Dataset:
    columns = {"image": [encoded(c) for c in COLOURS], "text": [f"{c} disc" for c in COLOURS]} | columns
    return datasets.Dataset.from_dict(columns)


def with_images(**columns: Any) -> datasets.Dataset:
    return table(**columns).cast_column("image", datasets.Image())


def open_set(path: Path, **fields: Any) -> HuggingFaceSet:
    return HuggingFaceSet(HuggingFaceData(kind="huggingface", path=path, image_size=8, **fields))


def assert_colours(data: HuggingFaceSet) -> None:
    assert len(data) == 6
    assert data.captions() == [f"{colour} disc" for colour in COLOURS]
    for index, colour in enumerate(COLOURS):
        view = data.sample(index, random.Random(0))
        assert view.captions.texts == (f"{colour} disc",)
        assert view.original_size == (10, 12)
        assert view.image.getcolors() == [(64, Image.new("RGB", (1, 1), colour).getpixel((0, 0)))]


def test_saved_data_sets(tmp_path: Path):
    with_images().save_to_disk(tmp_path / "many", num_shards=3)
    assert_colours(open_set(tmp_path / "many"))
    assert_colours(open_set(tmp_path / "many", check_images=False))
    pillow = {
        "image": [Image.new("RGB", (12, 10), c) for c in COLOURS],
        "text": [f"{c} disc" for c in COLOURS],
    }
    datasets.Dataset.from_dict(pillow).save_to_disk(tmp_path / "pillow")
    assert_colours(open_set(tmp_path / "pillow"))
    table().save_to_disk(tmp_path / "bytes")
    assert_colours(open_set(tmp_path / "bytes"))


def test_splits(tmp_path: Path):
    both = datasets.DatasetDict({"train": with_images(), "test": with_images(text=["x"] * 6)})
    both.save_to_disk(tmp_path / "both")
    assert_colours(open_set(tmp_path / "both", split="train"))
    assert open_set(tmp_path / "both", split="test").captions() == ["x"] * 6
    for split in (None, "valid"):
        with pytest.raises(DatasetError, match=r"data\.split .* test, train"):
            open_set(tmp_path / "both", split=split)
    datasets.DatasetDict({"train": with_images()}).save_to_disk(tmp_path / "single")
    assert_colours(open_set(tmp_path / "single"))


def test_parquet_files(tmp_path: Path):
    folder = tmp_path / "parquet"
    (folder / "data").mkdir(parents=True)
    with_images().select(range(4)).to_parquet(folder / "data" / "train-00000-of-00002.parquet")
    with_images().select(range(4, 6)).to_parquet(folder / "data" / "train-00001-of-00002.parquet")
    assert_colours(open_set(folder))
    with_images(text=["x"] * 6).to_parquet(folder / "data" / "test-00000-of-00001.parquet")
    assert_colours(open_set(folder, split="train"))
    assert len(open_set(folder, split="test")) == 6
    with pytest.raises(DatasetError, match=r"data\.split .* test, train"):
        open_set(folder)
    plain = tmp_path / "plain"
    plain.mkdir()
    table().to_parquet(plain / "pictures.parquet")
    assert_colours(open_set(plain))


def test_columns_of_other_names_and_several_captions(tmp_path: Path):
    several = [[f"{colour} disc", "a disc"] for colour in COLOURS]
    with_images(titles=several, number=range(6)).rename_column("image", "photo").save_to_disk(
        tmp_path / "set"
    )
    data = open_set(tmp_path / "set", image_column="photo", caption_column="titles")
    assert data.sample(1, random.Random(0)).captions.texts == ("green disc", "a disc")
    with pytest.raises(DatasetError, match=r"data\.image_column .* data\.caption_column .* photo, text"):
        open_set(tmp_path / "set", caption_column="prompt")
    with pytest.raises(DatasetError, match="'number'"):
        open_set(tmp_path / "set", image_column="number", caption_column="titles")


def test_every_problem_is_listed_at_once(tmp_path: Path):
    images = [encoded("red"), b"none", None, encoded("red")[:40], encoded("red"), encoded("red")]
    table(image=images, text=["a", "b", "c", "d", None, "f\0"]).save_to_disk(tmp_path / "set")
    with pytest.raises(DatasetError) as caught:
        open_set(tmp_path / "set")
    message = str(caught.value)
    assert "has 5 problems" in message
    for row in range(1, 6):
        assert f"row {row}: " in message


def test_bad_images_can_be_skipped_and_captions_cannot(tmp_path: Path):
    table(image=[encoded("red"), b"none", *map(encoded, COLOURS[2:])]).save_to_disk(tmp_path / "set")
    with pytest.warns(UserWarning, match="1 images are left out: row 1:"):
        data = open_set(tmp_path / "set", on_bad_image="skip")
    assert data.captions() == [f"{colour} disc" for colour in COLOURS if colour != "green"]
    assert data.sample(1, random.Random(0)).captions.texts == ("blue disc",)
    with pytest.raises(DatasetError, match="row 1"):
        open_set(tmp_path / "set", check_images=False).sample(1, random.Random(0))
    table(image=[b"none"] * 6).save_to_disk(tmp_path / "none")
    with pytest.warns(UserWarning, match="6 images"), pytest.raises(DatasetError, match="no row"):
        open_set(tmp_path / "none", on_bad_image="skip")


@pytest.mark.parametrize("path", ["http://host/a.png", "/etc/hostname"])
def test_images_that_are_only_named_are_not_fetched(tmp_path: Path, path: str):
    rows = {"image": [{"bytes": None, "path": path}], "text": ["a"]}
    text, data = datasets.Value("string"), datasets.Value("binary")
    features = datasets.Features({"image": {"bytes": data, "path": text}, "text": text})
    # With Image columns save_to_disk would fetch them.
    datasets.Dataset.from_dict(rows, features).save_to_disk(tmp_path / "set")
    with pytest.raises(DatasetError, match=f"row 0: .*{path}"):
        open_set(tmp_path / "set")


def test_folders_that_are_no_data_sets(tmp_path: Path):
    for folder in (tmp_path / "none", tmp_path):
        with pytest.raises(DatasetError, match="save_to_disk"):
            open_set(folder)
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing")
    with_images().save_to_disk(tmp_path / "cut")
    (arrow,) = (tmp_path / "cut").glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:300])
    for folder in (tmp_path, tmp_path / "cut"):
        with pytest.raises(DatasetError, match="cannot be read"):
            open_set(folder)


def test_a_data_set_cannot_name_files_outside(tmp_path: Path):
    with_images().save_to_disk(tmp_path / "other")
    with_images().save_to_disk(tmp_path / "set")
    state = json.loads((tmp_path / "set" / "state.json").read_text("utf-8"))
    state["_data_files"] = [{"filename": "../other/data-00000-of-00001.arrow"}]
    (tmp_path / "set" / "state.json").write_text(json.dumps(state), "utf-8")
    with pytest.raises(UnsafePathError, match=r"state\.json"):
        open_set(tmp_path / "set")


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match="datasets"):
        open_set(tmp_path)


def test_a_run_from_a_data_set_is_one_from_a_folder(
    text_to_image_recipe: MakeRecipe, image_folder: Path, tmp_path: Path
):
    names = sorted(COLOURS)
    with_images(
        image=[(image_folder / f"{name}.png").read_bytes() for name in names],
        text=[f"{name} disc" for name in names],
    ).save_to_disk(tmp_path / "set")
    fields = f"{{kind: huggingface, path: '{tmp_path / 'set'}', image_size: 16}}"
    ours = text_to_image_recipe(f"data={fields}", f"output_dir={tmp_path / 'ours'}")
    theirs = text_to_image_recipe(f"output_dir={tmp_path / 'theirs'}")
    assert isinstance(open_data(ours.data), HuggingFaceSet)
    for config in (ours, theirs):
        train(config)
    for name in ("weights.safetensors", "optimizer.safetensors"):
        files = [config.output_dir / "checkpoint-00000004" / name for config in (ours, theirs)]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_rows_that_show_the_same_image_are_known(tmp_path: Path):
    colours = ("red", "blue", "red", "green", "blue")
    rows = {"image": [encoded(colour) for colour in colours], "text": list("abcde")}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path)
    assert open_set(tmp_path).images == [0, 1, 0, 2, 1]
    assert open_set(tmp_path, check_images=False).images == [0, 1, 2, 3, 4]


def test_the_digest_changes_with_what_is_in_the_rows(tmp_path: Path):
    images, texts = [encoded(c) for c in COLOURS], [f"{c} disc" for c in COLOURS]
    sets = [
        (images, texts),
        (images, texts),
        (images, [*texts[:2], "else", *texts[3:]]),
        ([*images[:2], *images[3:], images[0]], texts),
        (images[:5], texts[:5]),
    ]
    digests = []
    for number, (own_images, own_texts) in enumerate(sets):
        table(image=own_images, text=own_texts).save_to_disk(tmp_path / str(number))
        digests.append(open_set(tmp_path / str(number)).digest)
    assert digests[0] == digests[1]
    assert len(set(digests)) == 4
