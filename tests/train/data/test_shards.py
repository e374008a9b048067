"""Tar shards: what tarfile writes and webdataset reads, read here at its place; every problem in one report."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image
from pydantic import ValidationError
from webdataset.shardlists import expand_urls

from latentgen.errors import DatasetError
from latentgen.train.config import WebDataset
from latentgen.train.data import open_data, sampler, shards, tar_index
from latentgen.train.data.sampler import BucketSampler, shard_order
from latentgen.train.data.shards import ShardSet, expand_shards
from latentgen.train.trainer import train
from tests.train.recipes import COLOURS, MakeRecipe, encoded

ROOT = Path(__file__).parents[3]
Member = tuple[str, bytes]


def middle(image: Image.Image) -> Image.Image:
    """Of 12x10 pixels the middle, 8x8."""
    return image.resize((10, 8), Image.Resampling.LANCZOS).crop((1, 0, 9, 8))


def write_tar(path: Path, members: Iterable[Member], *, form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def sample(key: str, colour: str, caption: str | None = None) -> list[Member]:
    return [(f"{key}.png", encoded(colour)), (f"{key}.txt", (caption or f"{colour} disc").encode())]


def open_shards(*names: str | Path, **fields: Any) -> ShardSet:
    return ShardSet(WebDataset(kind="webdataset", shards=tuple(map(str, names)), image_size=8, **fields))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three shards of two samples each."""
    for shard in range(3):
        two = COLOURS[2 * shard : 2 * shard + 2]
        write_tar(tmp_path / f"part-{shard:03}.tar", [m for c in two for m in sample(c, c)])
    return tmp_path


def view(data: ShardSet, index: int) -> Any:
    return data.sample(index, random.Random(0))


def test_every_sample_is_there(folder: Path):
    data = open_shards(folder / "part-{000..002}.tar")
    assert data.shard_counts == (2, 2, 2)
    assert data.captions() == [f"{colour} disc" for colour in COLOURS]
    for index, colour in enumerate(COLOURS):
        found = view(data, index)
        assert found.captions.texts == (f"{colour} disc",)
        assert found.image.getpixel((4, 4)) == Image.new("RGB", (1, 1), colour).getpixel((0, 0))
        assert (found.original_size, found.crop_corner) == ((10, 12), (0, 1))


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_it_reads_what_webdataset_reads(tmp_path: Path, form: int):
    deep = "/".join(["folder"] * 14)  # more than a hundred characters, for which formats have own fields
    members = [
        *sample("0001", "red"),
        ("0002.cls", b"7"),
        ("0002.JPG", encoded("blue", kind="JPEG")),
        ("0002.json", json.dumps({"caption": "blue thing", "more": [1]}).encode()),
        *sample(f"{deep}/0003", "green"),
        ("a.b/0004.webp", encoded("white", kind="WEBP")),
        ("a.b/0004.seg.png", b"no picture"),
        ("a.b/0004.txt", b" white thing \n"),
        ("__info__/readme.txt", b"none"),
        (".hidden.png", b"none"),
        ("./0005.jpeg", encoded("black", kind="JPEG")),
        ("./0005.json", json.dumps({"text": ["é 🍕", "two"]}).encode()),
    ]
    path = write_tar(tmp_path / "shard.tar", members, form=form)
    data = open_shards(path)
    theirs = []
    for row in webdataset.WebDataset(str(path), shardshuffle=False):
        image = next(row[suffix] for suffix in ("png", "jpg", "jpeg", "webp") if suffix in row)
        caption = row["txt"].decode().strip() if "txt" in row else None
        fields = json.loads(row["json"]) if "json" in row else {}
        captions = caption or fields.get("text") or fields["caption"]
        theirs.append((image, (captions,) if isinstance(captions, str) else tuple(captions)))
    assert len(data) == len(theirs) == 5
    for index, (image, captions) in enumerate(theirs):
        assert view(data, index).captions.texts == captions
        expected = middle(Image.open(io.BytesIO(image)).convert("RGB"))
        assert np.array_equal(view(data, index).image, expected)


BAD_SAMPLES: list[Member] = [
    *sample("good", "red"),
    ("lonely.png", encoded("red")),
    ("captions.txt", b"no image"),
    *sample("twice", "red"),
    ("twice.png", encoded("blue")),
    *sample("both", "red"),
    ("both.jpg", encoded("blue", kind="JPEG")),
    ("latin.png", encoded("red")),
    ("latin.txt", b"\xff\xfe"),
    ("list.png", encoded("red")),
    ("list.json", b'{"text": [1]}'),
    ("nothing.png", encoded("red")),
    ("nothing.json", b'{"title": "x"}'),
    ("broken.png", encoded("red")),
    ("broken.json", b"{"),
    ("nul.png", encoded("red")),
    ("nul.txt", b"a\0b"),
    ("long.png", encoded("red")),
    ("long.txt", b"x" * (tar_index.MAX_CAPTION_BYTES + 1)),
]


def test_every_problem_is_listed_at_once(tmp_path: Path):
    path = write_tar(
        tmp_path / "shard.tar", [*BAD_SAMPLES, ("cut.png", encoded("red")[:40]), ("cut.txt", b"cut")]
    )
    with pytest.raises(DatasetError) as caught:
        open_shards(path)
    with (
        pytest.warns(UserWarning, match=r"1 images are left out: .*cut\.png"),
        pytest.raises(DatasetError) as skipping,
    ):
        open_shards(path, on_bad_image="skip")
    for error, count in ((caught, 11), (skipping, 10)):
        message = str(error.value)
        assert f"data.shards (1 files) has {count} problems" in message
        names = (
            "lonely.png",
            "captions.txt",
            "twice.png",
            "both.jpg",
            "latin.txt",
            "list.json",
            "nothing.json",
        )
        for name in (*names, "broken.json", "nul.txt", "long.txt"):
            assert f"'{name}'" in message
        assert ("cut.png" in message) == (count == 11)


def test_a_long_report_counts_the_rest(tmp_path: Path):
    path = write_tar(tmp_path / "shard.tar", [(f"{number}.png", b"") for number in range(80)])
    with pytest.raises(DatasetError, match=r"has 80 problems: .*'49\.png'.*; and 30 more"):
        open_shards(path)


def test_bad_images_can_be_skipped_with_a_warning(tmp_path: Path):
    members = [*sample("a", "red"), ("b.png", b"GIF89a"), ("b.txt", b"b"), *sample("c", "blue")]
    path = write_tar(tmp_path / "shard.tar", members)
    for _ in range(2):  # then from the index
        with pytest.warns(UserWarning, match=r"1 images are left out: .*b\.png"):
            data = open_shards(path, on_bad_image="skip", index_dir=tmp_path / "index")
        assert data.captions() == ["red disc", "blue disc"]


def _without_end(data: bytes) -> bytes:
    whole = data.rstrip(b"\0")
    return whole.ljust(-(-len(whole) // 512) * 512, b"\0")


def _with_bad_header(data: bytes) -> bytes:
    begin = data.index(b"blue.png") + 20
    return data[:begin] + b"\xff" * 300 + data[begin + 300 :]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:700], "unexpected end of data"),
        (lambda data: data[: data.index(b"blue.png") + 600], "unexpected end of data"),
        (_without_end, "end-of-archive mark"),
        (_with_bad_header, "damaged at byte"),
        (lambda data: b"", "empty"),
        (lambda data: b"<!DOCTYPE html><html>", "HTML"),
        (gzip.compress, "compressed"),
        (lambda data: random.Random(0).randbytes(4096), "cannot be read as a tar file"),
        (lambda data: bytes(1024), "no sample"),
    ],
)
def test_damaged_shards(tmp_path: Path, damage: Callable[[bytes], bytes], message: str):
    members = [member for colour in ("red", "blue", "green") for member in sample(colour, colour)]
    path = write_tar(tmp_path / "shard.tar", members, form=tarfile.USTAR_FORMAT)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DatasetError, match=message):
        open_shards(path, on_bad_image="skip")


def test_links_and_folders_are_no_samples(tmp_path: Path):
    outside = tmp_path / "outside.png"
    outside.write_bytes(encoded("blue"))
    path = tmp_path / "shard.tar"
    with tarfile.open(path, "w") as archive:
        for name, kind in (
            ("a.png", tarfile.SYMTYPE),
            ("b.png", tarfile.LNKTYPE),
            ("c.png", tarfile.DIRTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, str(outside)
            archive.addfile(info)
        for name, data in (("../../d.png", encoded("red")), ("../../d.txt", b"up")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    before = sorted(tmp_path.rglob("*"))
    data = open_shards(path)
    assert data.captions() == ["up"]
    assert view(data, 0).image.getpixel((0, 0)) == (255, 0, 0)
    assert sorted(tmp_path.rglob("*")) == before


def test_without_checking_nothing_is_read_before_it_is_needed(tmp_path: Path):
    bad = [("b.png", b"none"), ("b.txt", b"b"), ("c.png", encoded("red")), ("c.json", b"[]")]
    path, index = write_tar(tmp_path / "shard.tar", [*sample("a", "red"), *bad]), tmp_path / "index"
    data = open_shards(path, check_images=False, index_dir=index)
    assert view(data, 0).captions.texts == ("red disc",)
    with pytest.raises(DatasetError, match=r"shard\.tar.*, image at byte"):
        view(data, 1)
    with pytest.raises(DatasetError, match=r"shard\.tar.*, 'caption at byte"):
        view(data, 2)
    with pytest.raises(DatasetError, match="2 problems"):  # its index is not taken for that of a checked set
        open_shards(path, index_dir=index)


def test_the_index_spares_the_second_run_the_reading(folder: Path, monkeypatch: pytest.MonkeyPatch):
    names, index = folder / "part-*.tar", folder / "index"
    first = open_shards(names, index_dir=index)
    surveyed: list[Path] = []

    def survey(path: Path, *, decode: bool) -> tar_index.ShardSurvey:
        surveyed.append(path)
        return tar_index.survey_shard(path, decode=decode)

    monkeypatch.setattr(shards, "survey_shard", survey)
    second = open_shards(names, index_dir=index)
    unchecked = open_shards(names, index_dir=index, check_images=False)
    assert surveyed == []
    assert second.captions() == unchecked.captions() == first.captions()
    write_tar(folder / "part-001.tar", [*sample("new", "white", "new one"), *sample("x", "red")])
    third = open_shards(names, index_dir=index)
    assert surveyed == [folder / "part-001.tar"]
    assert third.captions()[2] == "new one"
    open_shards(names, index_dir=index, check_images=False)
    assert len(surveyed) == 1
    assert len(list(index.glob("*.safetensors"))) == 2


def test_a_shard_that_changes_during_the_run(folder: Path):
    path = folder / "part-000.tar"
    data = open_shards(path)
    os.truncate(path, 700)
    with pytest.raises(DatasetError, match=r"part-000\.tar.* changed"):
        view(data, 1)
    data = open_shards(folder / "part-001.tar")
    view(data, 0)
    os.truncate(folder / "part-001.tar", 700)
    with pytest.raises(DatasetError, match=r"part-001\.tar.* cut off"):
        view(data, 1)


_WORKER = """
import sys, torch.distributed as dist
from pathlib import Path
from latentgen.errors import DatasetError
from latentgen.train.data import shards
from tests.train.data.test_shards import open_shards
folder, rank = Path(sys.argv[1]), int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
surveyed = []
survey = shards.survey_shard
shards.survey_shard = lambda path, *, decode: (surveyed.append(path.name), survey(path, decode=decode))[1]
data = open_shards(folder / "part-*.tar", index_dir=folder / "index")
assert surveyed == [["part-000.tar", "part-002.tar"], ["part-001.tar"]][rank], surveyed
assert len(data.captions()) == 6
try:
    open_shards(folder / "*.tar", index_dir=folder / "index")
except DatasetError as error:
    assert "1 problems" in str(error), error
    assert surveyed[2 - rank:] == ["bad.tar"] * (1 - rank), surveyed
else:
    raise AssertionError
dist.destroy_process_group()
"""


def test_each_process_looks_into_its_share(folder: Path):
    write_tar(folder / "bad.tar", [("a.png", b"none"), ("a.txt", b"a")])
    command = [sys.executable, "-c", _WORKER, str(folder)]
    workers = [subprocess.Popen([*command, str(rank)], cwd=ROOT) for rank in range(2)]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]


def test_few_files_are_open_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shards, "_OPEN_FILES", 2)
    data = open_shards(folder / "part-*.tar")
    before = len(os.listdir("/proc/self/fd"))
    data.captions()
    assert len(os.listdir("/proc/self/fd")) == before + 2


def test_names_of_shards(folder: Path):
    pattern = f"{folder}/part-{{000..002}}.tar"
    expected = [Path(name) for name in expand_urls(pattern)]
    assert expand_shards([pattern]) == expected
    assert expand_shards([f"{folder}/part-*.tar"]) == expected
    assert expand_shards([f"{folder}/part-{{0..0}}0{{0..2}}.tar"]) == expected
    for names, problem in (
        ([f"{folder}/part-{{000..003}}.tar"], r"part-003\.tar"),
        ([f"{folder}/none-*.tar"], "none-"),
        ([pattern, f"{folder}/part-001.tar"], r"part-001\.tar.* twice"),
        ([f"{folder}/{{5..1}}.tar"], r"\{5\.\.1\}"),
        ([f"{folder}/{{0..9999999}}.tar"], "100,000"),
        ([f"{folder}/{{000..999}}{{000..999}}.tar"], "100,000"),
    ):
        with pytest.raises(DatasetError, match=problem):
            expand_shards(names)


@pytest.mark.parametrize(
    "name", ["pipe:cat /etc/passwd", "http://host/a.tar", "s3://bucket/a.tar", "gs://b/{0..9}.tar"]
)
def test_commands_and_addresses_are_refused(name: str):
    for names in ((name,), 3):
        with pytest.raises(ValidationError, match="shards"):
            WebDataset.model_validate({"kind": "webdataset", "shards": names, "image_size": 8})


def test_an_epoch_shows_every_item_once_and_reads_few_shards_at_a_time():
    counts = [7, 0, 12, 5, 9, 30, 1, 8, 8, 20]
    shard_of = np.repeat(np.arange(10), counts)
    orders = [shard_order(3, epoch, counts, together=2) for epoch in range(3)]
    for items in orders:
        assert sorted(items) == list(range(100))
        spans = {shard: np.flatnonzero(shard_of[items] == shard) for shard in range(10) if counts[shard]}
        open_at = [sum(span[0] <= place <= span[-1] for span in spans.values()) for place in range(100)]
        assert max(open_at) <= 2
    assert not np.array_equal(orders[0], orders[1])
    assert np.array_equal(orders[1], shard_order(3, 1, counts, together=2))
    assert not np.array_equal(orders[1], shard_order(4, 1, counts, together=2))


def test_views_are_cropped_and_captioned_as_those_of_folders(tmp_path: Path):
    sizes = [(32, 8), (8, 32), (20, 20), (60, 15)]
    images = [(f"{number}.png", encoded("red", size)) for number, size in enumerate(sizes)]
    texts = [(f"{number}.txt", b"one, two, three") for number in range(4)]
    path = write_tar(tmp_path / "0.tar", [*images, *texts])
    captions = {"caption_prefix": "a photo,", "caption_shuffle": True, "keep_tokens": 2}
    data = open_shards(path, buckets=True, bucket_step=4, **captions)
    expected = [(4, 16), (16, 4), (8, 8), (4, 16)]
    assert [data.bucket(index) for index in range(4)] == expected
    for index, (height, width) in enumerate(expected):
        assert view(data, index).image.size == (width, height)
        assert view(data, index).original_size == sizes[index][::-1]
    assert data.captions()[0] == "a photo, one, two, three"
    drawn = {view(data, 0).captions.draw(random.Random(seed)) for seed in range(20)}
    assert drawn == {"a photo, one, two, three", "a photo, one, three, two"}


def test_the_order_of_a_run_reads_few_shards_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sampler.shard_order, "__kwdefaults__", {"together": 1, "bucket": 0})
    sequence = BucketSampler.of(open_shards(folder / "part-*.tar"), views=2)
    for epoch in range(3):
        steps = [sequence.items(7, 3 * epoch + step, 4, range(4)) for step in range(3)]
        assert sorted(item for items in steps for item in items) == list(range(12))
        assert all(len({item // 4 for item in items}) == 1 for items in steps)


def test_an_order_never_changes():
    assert shard_order(1, 2, [3, 3, 2], together=2).tolist() == [3, 6, 5, 4, 7, 0, 1, 2]


def test_a_run_over_shards_resumes_as_if_it_had_not_stopped(
    text_to_image_recipe: MakeRecipe, folder: Path, tmp_path: Path
):
    fields = f"{{kind: webdataset, shards: '{folder}/part-*.tar', image_size: 16}}"
    overrides = [f"data={fields}", "optimizer.decay_fraction=0"]
    cut = f"output_dir={tmp_path / 'cut'}"
    train(text_to_image_recipe(*overrides, cut, "max_steps=2"))
    resumed = text_to_image_recipe(*overrides, cut, "resume=true", f"data.index_dir={tmp_path / 'index'}")
    train(resumed)
    whole = text_to_image_recipe(*overrides, f"output_dir={tmp_path / 'whole'}")
    assert isinstance(open_data(whole.data), ShardSet)
    train(whole)
    for name in ("weights.safetensors", "optimizer.safetensors"):
        files = [config.output_dir / "checkpoint-00000004" / name for config in (resumed, whole)]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_the_digest_changes_with_what_is_in_the_shards(folder: Path):
    first = open_shards(folder / "part-*.tar").digest
    index = {"index_dir": folder / "index"}
    assert open_shards(folder / "part-*.tar", **index).digest == first
    assert open_shards(folder / "part-*.tar", **index).digest == first, "now from the index"
    assert open_shards(folder / "part-00[01].tar").digest != first
    two = COLOURS[:2]
    write_tar(folder / "part-000.tar", [m for c in two for m in sample(c, c, f"a {c} disc")])
    assert open_shards(folder / "part-*.tar").digest != first
