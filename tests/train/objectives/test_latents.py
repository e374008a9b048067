"""Views in latents: equal in memory, on disk and shared by processes; new ones in every step."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from latentgen.errors import CheckpointCorruptError, DatasetError
from latentgen.models.pixels import ImageEncoder
from latentgen.train.config import TrainConfig
from latentgen.train.data import BatchIndices, Captions, Sample, open_splits, plan_step, to_tensor
from latentgen.train.objectives import build_objective, latents
from latentgen.train.objectives.base import Objective
from latentgen.train.objectives.latent_cache import CachedLatents, encode_views
from latentgen.train.objectives.latent_diffusion import LatentObjective
from latentgen.train.objectives.latents import (
    CondKind,
    LatentBatch,
    LatentDataset,
    ViewEncoder,
    ViewSource,
    batch_limit,
)
from latentgen.train.objectives.pretrained import load_vae
from latentgen.train.trainer import train
from tests.train.recipes import MakeRecipe, plan_for
from tests.train.runs import assert_same_checkpoint

CPU = torch.device("cpu")
HELD_OUT = ("validation_fraction=0.34", "validation.loss_every=2")
ROOT = Path(__file__).parents[3]


class Scribbles:
    """Six random pictures: the even ones 16 wide and 16 high, the odd ones 24 wide and 8 high, the last two masked."""

    image_size = 16
    is_random = True

    def __len__(self) -> int:
        return 6

    def sample(self, index: int, rng: random.Random) -> Sample:
        size = (24, 8) if index % 2 else (16, 16)
        image = Image.new("RGB", size, tuple(rng.randrange(256) for _ in range(3)))
        ImageDraw.Draw(image).line([rng.randrange(16) for _ in range(6)], "red", 2)
        mask = None
        if index > 3:
            mask = Image.new("L", size)
            mask.paste(255, (0, 0, 3, 8))
        corner = (rng.randrange(5), 1)
        return Sample(image, Captions((f"number {index}",), (1.0,)), (100, 50 + index), corner, mask)

    def captions(self) -> list[str]:
        return []


def plan(*items: int, step: int = 0) -> BatchIndices:
    return BatchIndices(3, step, len(items), tuple(range(len(items))), items)


@pytest.fixture
def encoder(tiny_checkpoint: Path) -> ImageEncoder:
    return load_vae(tiny_checkpoint)[0]


@pytest.fixture(params=["upscale_recipe", "paired_recipe", "text_to_image_recipe"])
def recipe(request: pytest.FixtureRequest) -> MakeRecipe:
    return request.getfixturevalue(request.param)


@pytest.fixture
def encoded_images(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each call of the encoder was given, fillings included."""
    counts: list[int] = []
    encode = ViewEncoder.encode

    def counting(self: ViewEncoder, images: Any) -> list[Tensor]:
        counts.append(len(images))
        return encode(self, images)

    monkeypatch.setattr(ViewEncoder, "encode", counting)
    return counts


def build(config: TrainConfig) -> Objective:
    torch.manual_seed(1)
    return build_objective(config, device=CPU)


def assert_same_batches(ours: Objective, theirs: Objective) -> None:
    for step in range(3):
        for our, their in zip(
            ours.batch(plan_for(ours, step)), theirs.batch(plan_for(theirs, step)), strict=True
        ):
            assert our.dtype == their.dtype
            assert torch.equal(our, their)


def encoded(dataset: LatentDataset, index: int) -> LatentBatch:
    return dataset.batch(plan(index))


def assert_same_views(ours: LatentDataset, theirs: LatentDataset, count: int) -> None:
    for index in range(count):
        our, their = encoded(ours, index), encoded(theirs, index)
        assert torch.equal(our.views[0].posterior, their.views[0].posterior)
        assert torch.equal(our.time_ids(), their.time_ids())
        assert torch.equal(our.masks(), their.masks())
        assert our.captions(0.0) == their.captions(0.0)


def test_a_cache_changes_nothing_but_the_time(recipe: MakeRecipe, tmp_path: Path, encoded_images: list[int]):
    cache = f"task.cache_dir={tmp_path / 'cache'}"
    in_memory, first = build(recipe()), build(recipe(cache))
    assert encoded_images
    encoded_images.clear()
    second = build(recipe(cache))
    assert not encoded_images
    assert_same_batches(first, in_memory)
    assert_same_batches(second, in_memory)


def test_tasks_share_what_they_encode_alike(
    text_to_image_recipe: MakeRecipe,
    paired_recipe: MakeRecipe,
    tmp_path: Path,
    encoded_images: list[int],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(latents, "ENCODING_BATCH", 1)
    cache = f"task.cache_dir={tmp_path / 'cache'}"
    build(text_to_image_recipe(cache))
    assert len(encoded_images) == 6  # both views of an item are the same centre crop
    build(paired_recipe(cache))
    assert len(encoded_images) == 10  # black and white have no colour to lose


class Stills(Scribbles):
    """As Scribbles, but one view is like another."""

    is_random = False

    def sample(self, index: int, rng: random.Random) -> Sample:
        return super().sample(index, random.Random(index))


class StillsUnawares(Stills):
    """The same, which does not say so."""

    is_random = True


def halved(view: Sample, _: random.Random) -> Sample:
    return view._replace(before=view.image.point([level // 2 for level in range(256)] * 3))


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("cond", ["none", "latents", "pixels"])
def test_views_that_are_the_same_are_encoded_once(
    encoder: ImageEncoder, cond: CondKind, cached: bool, tmp_path: Path, encoded_images: list[int]
):
    cache_dir = tmp_path if cached else None
    change = None if cond == "none" else halved
    sources = [ViewSource(data, 80, 0, change, False) for data in (StillsUnawares(), Stills())]
    every = encode_views(encoder, CPU, sources[0], cond=cond)
    encoded_images.clear()
    once = encode_views(encoder, CPU, sources[1], cond=cond, cache_dir=cache_dir)
    # Of three images of each of two sizes, filled up to a batch.
    assert sum(encoded_images) == 2 * 32
    assert_same_views(once, every, 6 * 80)
    if cond != "none":
        for index in range(6 * 80):
            ours, theirs = encoded(once, index).views[0].cond, encoded(every, index).views[0].cond
            assert ours is not None
            assert theirs is not None
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("recipe", "overrides", "each"),
    [
        ("text_to_image_recipe", (), 1),
        ("text_to_image_recipe", ("data.crop=random",), 16),
        ("text_to_image_recipe", ("data.horizontal_flip=true",), 16),
        ("text_to_image_recipe", HELD_OUT, 1),
        ("text_to_image_recipe", (*HELD_OUT, "data.crop=random"), 16),
        ("paired_recipe", ("task.degradation=colorization",), 1),
        ("paired_recipe", ("task.degradation=jpeg",), 16),
    ],
)
def test_random_views_are_all_encoded(
    recipe: str, overrides: tuple[str, ...], each: int, request: pytest.FixtureRequest
):
    config = request.getfixturevalue(recipe)("task.views_per_image=16", *overrides)
    data = open_splits(config).training
    objective = build_objective(config, device=CPU, data=data)
    assert isinstance(objective, LatentObjective)
    assert isinstance(objective._latents, CachedLatents)
    assert len(objective._latents._views) == len(data) * each
    # The samples of a step do not depend on it.
    assert len(objective.order) == len(data) * 16
    assert objective.batch(plan_for(objective))[0].isfinite().all()


def test_another_autoencoder_has_other_latents(encoder: ImageEncoder, tmp_path: Path):
    source = ViewSource(Scribbles(), 1, seed=0)
    before = encode_views(encoder, CPU, source, cache_dir=tmp_path)
    with torch.no_grad():
        next(encoder.parameters()).mul_(1.5)
    after = encode_views(encoder, CPU, source, cache_dir=tmp_path)
    assert not torch.equal(encoded(after, 0).views[0].posterior, encoded(before, 0).views[0].posterior)
    assert_same_views(after, encode_views(encoder, CPU, source), 6)


def test_latents_do_not_depend_on_what_was_cached_before(encoder: ImageEncoder, tmp_path: Path):
    class OnlyTwo(Scribbles):
        def __len__(self) -> int:
            return 2

    encode_views(encoder, CPU, ViewSource(OnlyTwo(), 3, seed=0), cache_dir=tmp_path)
    source = ViewSource(Scribbles(), 3, seed=0)
    assert_same_views(
        encode_views(encoder, CPU, source, cache_dir=tmp_path), encode_views(encoder, CPU, source), 18
    )


def test_damaged_entries_are_computed_again(encoder: ImageEncoder, tmp_path: Path, encoded_images: list[int]):
    source = ViewSource(Scribbles(), 2, seed=0)
    whole = encode_views(encoder, CPU, source)
    encode_views(encoder, CPU, source, cache_dir=tmp_path)
    (file,) = tmp_path.rglob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    encoded_images.clear()
    with pytest.warns(UserWarning, match="damaged and is deleted"):
        fixed = encode_views(encoder, CPU, source, cache_dir=tmp_path)
    assert encoded_images
    assert_same_views(fixed, whole, 12)
    encoded_images.clear()
    assert_same_views(encode_views(encoder, CPU, source, cache_dir=tmp_path), whole, 12)
    assert not encoded_images


def test_damage_during_the_run_is_an_error(encoder: ImageEncoder, tmp_path: Path):
    views = encode_views(encoder, CPU, ViewSource(Scribbles(), 1, seed=0), cache_dir=tmp_path)
    (file,) = tmp_path.rglob("*.safetensors")
    with file.open("r+b") as handle:
        handle.seek(-1, 2)
        last = handle.read(1)[0]
        handle.seek(-1, 2)
        handle.write(bytes([last ^ 1]))
    with (
        pytest.warns(UserWarning, match="checksums"),
        pytest.raises(CheckpointCorruptError, match=re.escape(str(tmp_path))),
    ):
        [encoded(views, index) for index in range(6)]


def test_views_of_several_sizes_are_those_of_diffusers(encoder: ImageEncoder, tiny_checkpoint: Path):
    from diffusers import AutoencoderKL

    source = ViewSource(Scribbles(), 2, seed=0)
    views = encode_views(encoder, CPU, source)
    oracle = AutoencoderKL.from_pretrained(tiny_checkpoint / "vae")
    for items in ((0, 5, 4, 9), (2, 3, 6, 7)):  # of the even pictures, and of the odd ones
        batch = plan(*items)
        with torch.no_grad():
            posterior = oracle.encode(to_tensor([source.fixed(item).image for item in items])).latent_dist
        noise = batch.noise(posterior.mean.shape[1:], "posterior")
        expected = (posterior.mean + posterior.std * noise) * 0.18215
        latents = views.batch(batch).latents()
        assert latents.shape == expected.shape
        assert ((latents - expected).norm() / expected.norm()).item() < 1e-3  # stored in float16


def test_fresh_views_are_drawn_by_step_and_sample(encoder: ImageEncoder, tiny_checkpoint: Path):
    from diffusers import AutoencoderKL

    source = ViewSource(Scribbles(), 0, seed=0)
    views = encode_views(encoder, CPU, source)
    oracle = AutoencoderKL.from_pretrained(tiny_checkpoint / "vae")
    seen = []
    for step in range(3):
        batch = plan(2, 4, 2, step=step)
        images = [
            source.data.sample(item, rng).image
            for item, rng in zip(batch.items, batch.rngs("view"), strict=True)
        ]
        with torch.no_grad():
            posterior = oracle.encode(to_tensor(images)).latent_dist
        expected = (
            posterior.mean + posterior.std * batch.noise(posterior.mean.shape[1:], "posterior")
        ) * 0.18215
        latents = views.batch(batch).latents()
        assert ((latents - expected).norm() / expected.norm()).item() < 1e-3
        seen += [*latents]
        again = encode_views(encoder, CPU, source)
        assert torch.equal(again.batch(batch).latents(), latents)
        assert views.batch(batch).captions(0.0) == ["number 2", "number 4", "number 2"]
    assert all(not torch.equal(ours, theirs) for i, ours in enumerate(seen) for theirs in seen[:i])


@pytest.mark.parametrize("per_item", [0, 2])
def test_the_random_numbers_of_a_change_can_be_reproduced(
    encoder: ImageEncoder, per_item: int, tmp_path: Path
):
    def brightened(view: Sample, rng: random.Random) -> Sample:
        return view._replace(before=view.image.point([rng.randrange(200, 256)] * 768))

    source = ViewSource(Scribbles(), per_item, 0, brightened)
    batch = plan(0, 4, 4)
    in_latents = encode_views(encoder, CPU, source, cond="latents", cache_dir=tmp_path)
    in_pixels = encode_views(encoder, CPU, source, cond="pixels", cache_dir=tmp_path)
    pixels = in_pixels.batch(batch).cond_pixels()
    levels = [rng.randrange(200, 256) for rng in in_pixels.batch(batch).change_rngs]
    assert [row.unique().tolist() for row in (pixels + 1) * 127.5] == [[level] for level in levels]
    assert (len(set(levels)) == 3) == (per_item == 0)
    with torch.no_grad():
        posterior = encoder(pixels)
    torch.testing.assert_close(in_latents.batch(batch).cond_means(), posterior.mean, atol=1e-3, rtol=1e-3)
    noise = batch.noise(posterior.mean.shape[1:], "shown posterior")
    torch.testing.assert_close(
        in_latents.batch(batch).cond_latents(), posterior.sample(noise), atol=2e-3, rtol=1e-3
    )
    assert torch.equal(in_latents.batch(batch).latents(), in_pixels.batch(batch).latents())


def test_a_view_without_a_conditioning_image(encoder: ImageEncoder):
    with pytest.raises(DatasetError, match="before"):
        encode_views(encoder, CPU, ViewSource(Scribbles(), 1, 0), cond="latents")


@pytest.mark.parametrize("degradation", ["colorization", "inpainting"])
def test_a_batch_is_a_function_of_its_plan(degradation: str, paired_recipe: MakeRecipe):
    config = paired_recipe(f"task.degradation={degradation}")
    objective, again = build(config), build(config)
    assert_same_batches(objective, again)
    plan = plan_for(objective)
    (_, part) = plan_step(3, 0, batch_size=8, order=objective.order, parts=2, rank=0, processes=1)
    for whole, half in zip(objective.batch(plan), objective.batch(part), strict=True):
        assert torch.equal(whole[list(part.samples)], half)


def test_fresh_batches_are_functions_of_their_plans(recipe: MakeRecipe, tmp_path: Path):
    cache = tmp_path / "cache"
    config = recipe("task.views_per_image=0", f"task.cache_dir={cache}")
    objective = build(config)
    assert isinstance(objective, LatentObjective)
    assert len(objective.order) == 6
    assert_same_batches(objective, build(config))
    assert objective(*objective.batch(plan_for(objective))).total.isfinite()
    assert not cache.exists()


def test_a_run_with_fresh_views_resumes_as_if_it_had_not_stopped(paired_recipe: MakeRecipe, tmp_path: Path):
    fresh = ("task.views_per_image=0", "task.degradation=inpainting", "optimizer.decay_fraction=0")
    whole = paired_recipe(*fresh, f"output_dir={tmp_path / 'whole'}")
    train(whole)
    train(paired_recipe(*fresh, "max_steps=2"))
    cut = paired_recipe(*fresh, "resume=true")
    train(cut)
    last = "checkpoint-00000004"
    assert_same_checkpoint(cut.output_dir / last, whole.output_dir / last)


def test_masks_are_brought_to_the_latents_by_area(encoder: ImageEncoder):
    views = encode_views(encoder, CPU, ViewSource(Scribbles(), 1, seed=0))
    masks = views.batch(plan(0, 4)).masks()
    assert masks.shape == (2, 1, 8, 8)
    assert (masks[0] == 1).all()
    expected = torch.zeros(8, 8)
    expected[:4, 0] = 1
    expected[:4, 1] = 0.5
    torch.testing.assert_close(masks[1, 0], expected, atol=1 / 255, rtol=0)


def test_large_images_are_encoded_a_few_at_a_time():
    assert [batch_limit((side, side)) for side in (64, 128, 256, 512, 1024, 2048)] == [32, 16, 4, 1, 1, 1]


_WORKER = """
import sys, torch, torch.distributed as dist
from pathlib import Path
from latentgen.train.objectives.latent_cache import encode_views
from latentgen.train.objectives.latents import ViewEncoder, ViewSource
from latentgen.train.objectives.pretrained import load_vae
from tests.train.objectives.test_latents import CPU, Scribbles, assert_same_views
folder, rank, cache = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{cache.parent / 'meeting'}", rank=rank, world_size=2)
encoder = load_vae(folder)[0]
source = ViewSource(Scribbles(), 4, seed=0)
expected = encode_views(encoder, CPU, source)
added = []
encode = ViewEncoder.encode
ViewEncoder.encode = lambda self, images: (added.extend(set(map(id, images))), encode(self, images))[1]
views = encode_views(encoder, CPU, source, cache_dir=cache)
assert len(added) == 12, len(added)
assert_same_views(views, expected, 24)
dist.destroy_process_group()
"""


def test_each_process_encodes_its_share(tiny_checkpoint: Path, tmp_path: Path):
    arguments = [sys.executable, "-c", _WORKER, str(tiny_checkpoint)]
    workers = [
        subprocess.Popen([*arguments, str(rank), str(tmp_path / "cache")], cwd=ROOT) for rank in range(2)
    ]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
