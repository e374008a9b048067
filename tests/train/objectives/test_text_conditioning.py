"""Frozen text encoders: each caption is encoded once, with a cache on disk or without, and no weights are trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from latentgen.checkpoints.folder import CheckpointFolder
from latentgen.errors import ConfigError
from latentgen.models.text import CLIPText, CLIPTextPair, Conditioning, TextEncoder
from latentgen.pipelines.load_save import LoadOptions, load_text_encoder
from latentgen.train.config import TrainConfig
from latentgen.train.host_memory import temporarily_on
from latentgen.train.objectives import build_objective, latent_diffusion
from latentgen.train.objectives.latent_diffusion import LatentObjective
from latentgen.train.objectives.text_conditioning import CaptionCache
from latentgen.train.trainer import train
from tests.pipelines.sdxl import build_base
from tests.train.finetuning import CAPTIONS as SHORT
from tests.train.finetuning import Pictures, folder_of, objective_of
from tests.train.recipes import COLOURS, MakeRecipe, plan_for
from tests.train.runs import assert_same_checkpoint, forget_accelerate, losses_of

FULL = {"kind": "full"}
LORA = {"kind": "lora", "rank": 2}
CPU = torch.device("cpu")
LONG = "a red dog and a tiger " * 30
CAPTIONS = ["red dog", "", "tiger", LONG, "red dog", "cat " * 100]
SHUFFLED = "data.caption_shuffle=true"


@pytest.fixture(params=["upscale_recipe", "paired_recipe"])
def recipe(request: pytest.FixtureRequest) -> MakeRecipe:
    return request.getfixturevalue(request.param)


def build(config: TrainConfig) -> LatentObjective[Any]:
    torch.manual_seed(1)
    objective = build_objective(config, device=torch.device("cpu"))
    assert isinstance(objective, LatentObjective)
    return objective


def encode_in_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latent_diffusion, "CAPTION_BYTES", 0)


def is_part(objective: LatentObjective[Any]) -> bool:
    return "text_encoder" in dict(objective.named_children())


def test_over_a_whole_run_each_caption_is_encoded_once(recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch):
    encoded: list[str] = []
    passes: list[int] = []
    encode, encode_tokens = CLIPText.encode, CLIPText.encode_tokens

    def encode_seen(self: CLIPText, prompts: Sequence[str], *, clip_skip: int = 0) -> Conditioning:
        encoded.extend(prompts)
        return encode(self, prompts, clip_skip=clip_skip)

    def encode_tokens_seen(self: CLIPText, ids: Tensor, *, clip_skip: int = 0) -> Conditioning:
        passes.append(len(ids))
        return encode_tokens(self, ids, clip_skip=clip_skip)

    monkeypatch.setattr(CLIPText, "encode", encode_seen)
    monkeypatch.setattr(CLIPText, "encode_tokens", encode_tokens_seen)
    train(recipe("task.caption_dropout=0.3", "max_steps=8"))
    assert sorted(filter(None, encoded)) == sorted(f"{colour} disc" for colour in COLOURS)
    assert passes == [32]  # these and the empty caption, filled up


def test_captions_belong_to_their_images_and_are_dropped(recipe: MakeRecipe):
    texts = [f"{colour} disc" for colour in sorted(COLOURS)]
    for rate, caption_of in ((0, lambda item: texts[item // 2]), (1, lambda _: "")):
        objective = build(recipe(f"task.caption_dropout={rate}"))
        plan = plan_for(objective, size=12)
        context = objective.batch(plan)[3]
        expected = objective._text.encode([caption_of(item) for item in plan.items]).context
        torch.testing.assert_close(context, expected, atol=2e-6, rtol=1e-5)


def test_what_moves_to_the_device_holds_neither_text_encoder_nor_autoencoder(recipe: MakeRecipe):
    objective = build(recipe())
    assert {name.split(".")[0] for name in objective.state_dict()} == {"unet"}
    objective.to("meta")
    kept = nn.ModuleList([objective._text.module, *objective._vae])
    assert {tensor.device.type for tensor in (*kept.parameters(), *kept.buffers())} == {"cpu"}


def assert_same_losses(ours: LatentObjective[Any], theirs: LatentObjective[Any]) -> None:
    for step in range(3):
        one, other = (each(*each.batch(plan_for(each, step))).total for each in (ours, theirs))
        assert one.item() == pytest.approx(other.item(), rel=1e-6)


def test_the_losses_are_those_of_encoding_in_every_step(recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch):
    cached = build(recipe("task.caption_dropout=0.3"))
    encode_in_every_step(monkeypatch)
    plain = build(recipe("task.caption_dropout=0.3"))
    assert (is_part(cached), is_part(plain)) == (False, True)
    assert_same_losses(cached, plain)


@pytest.mark.parametrize("family", ["sd", "sdxl", "inpainting", "instruct"])
def test_fine_tuning_has_the_same_losses(family: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    # Captions of different lengths, of which some fill two windows.
    data = Pictures((*SHORT[:4], "cat " * 100, "red " * 100))
    fields: dict[str, Any] = {"prior": {"prompt": ["dog", "tiger"], "images": 2}} if family == "sd" else {}
    cached = objective_of(FULL, folder_of(family), tmp_path, data, **fields)
    encode_in_every_step(monkeypatch)
    plain = objective_of(FULL, folder_of(family), tmp_path, data, **fields)
    assert (is_part(cached), is_part(plain)) == (False, True)
    assert_same_losses(cached, plain)


def test_a_frozen_text_encoder_of_text_to_image_is_cached_too(
    text_to_image_recipe: MakeRecipe, tmp_path: Path
):
    first = build(text_to_image_recipe())
    first.save(tmp_path / "model", first.state_dict())
    frozen = ("task.train_text_encoder=false", f"init_from={tmp_path / 'model'}", "task.caption_dropout=0")
    objective = build(text_to_image_recipe(*frozen))
    assert not is_part(objective)
    assert_same_losses(objective, build(text_to_image_recipe(*frozen[1:])))


@pytest.mark.parametrize(
    "overrides", [(), ("task.cache_dir=CACHE",), (SHUFFLED,), ("task.views_per_image=0",)]
)
def test_processes_that_prepare_batches_change_nothing(
    overrides: tuple[str, ...], paired_recipe: MakeRecipe, image_folder: Path, tmp_path: Path
):
    for colour in COLOURS:
        (image_folder / f"{colour}.txt").write_text(f"{colour}, disc, on grey, small", "utf-8")
    overrides = tuple(text.replace("CACHE", str(tmp_path / "cache")) for text in overrides)
    assert is_part(build(paired_recipe(*overrides))) == bool(
        {SHUFFLED, "task.views_per_image=0"} & set(overrides)
    )
    runs = []
    for workers in (0, 2):
        config = paired_recipe(*overrides, f"workers={workers}", f"output_dir={tmp_path / str(workers)}")
        forget_accelerate()
        train(config)
        runs.append(config)
    assert losses_of(runs[0]) == losses_of(runs[1])
    last = "checkpoint-00000004"
    assert_same_checkpoint(runs[1].output_dir / last, runs[0].output_dir / last)


def test_networks_that_were_on_another_device_have_the_same_tensors():
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    tensors = {name: tensor.data_ptr() for name, tensor in network.state_dict().items()}
    trained = list(network.parameters())
    with temporarily_on(network, torch.device("meta")):
        assert all(tensor.is_meta for tensor in network.state_dict().values())
    assert {name: tensor.data_ptr() for name, tensor in network.state_dict().items()} == tensors
    assert all(now is then for now, then in zip(network.parameters(), trained, strict=True))


@pytest.fixture(scope="module")
def sdxl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny-sdxl"
    build_base().save_pretrained(folder)
    return folder


@pytest.fixture(params=["SD", "SDXL"])
def text(request: pytest.FixtureRequest, tiny_checkpoint: Path) -> TextEncoder:
    folder = tiny_checkpoint if request.param == "SD" else request.getfixturevalue("sdxl_folder")
    encoder = load_text_encoder(CheckpointFolder.open(folder), LoadOptions(torch.float32, CPU))
    assert isinstance(encoder, CLIPText if request.param == "SD" else CLIPTextPair)
    return encoder


def assert_same(ours: Conditioning, theirs: Conditioning) -> None:
    assert torch.equal(ours.context, theirs.context)
    assert ours.pooled is not None
    assert theirs.pooled is not None
    assert torch.equal(ours.pooled, theirs.pooled)


def test_it_is_what_the_encoder_gives(text: TextEncoder, tmp_path: Path):
    expected = text.encode(CAPTIONS)
    for cache_dir in (None, tmp_path):
        actual = CaptionCache(text, CPU, cache_dir).encode(CAPTIONS)
        assert actual.context.shape == expected.context.shape
        torch.testing.assert_close(actual.context, expected.context, atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(actual.pooled, expected.pooled, atol=2e-6, rtol=1e-5)


def test_a_caption_gives_the_same_whatever_is_beside_it(text: TextEncoder, tmp_path: Path):
    alone = CaptionCache(text, CPU)
    for captions in (["tiger"], CAPTIONS, ["dog", "red dog"]):
        first = CaptionCache(text, CPU, tmp_path)
        first.add(captions)
        assert_same(first.encode(captions), alone.encode(captions))
    assert_same(CaptionCache(text, CPU, tmp_path).encode(CAPTIONS), alone.encode(CAPTIONS))


def test_each_caption_is_encoded_once(text: TextEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    encoded: list[str] = []
    encode = CaptionCache._encode

    def counting(self: CaptionCache, captions: list[str], keys: list[str]) -> None:
        encoded.extend(captions)
        encode(self, captions, keys)

    monkeypatch.setattr(CaptionCache, "_encode", counting)
    cache = CaptionCache(text, CPU, tmp_path)
    cache.add(CAPTIONS)
    assert sorted(encoded) == sorted(set(CAPTIONS))
    CaptionCache(text, CPU, tmp_path).add(CAPTIONS)
    cache.encode([*CAPTIONS, "new"])
    assert sorted(encoded) == sorted({*CAPTIONS, "new"})


def test_other_weights_have_other_entries(text: TextEncoder, tmp_path: Path):
    first = CaptionCache(text, CPU, tmp_path).encode(["red dog"])
    with torch.no_grad():
        next(text.module.parameters()).add_(0.1)
    changed = CaptionCache(text, CPU, tmp_path).encode(["red dog"])
    assert not torch.equal(changed.context, first.context)


def test_workers_cannot_use_an_accelerator(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    text = load_text_encoder(CheckpointFolder.open(tiny_checkpoint), LoadOptions(torch.float32, CPU))
    cache = CaptionCache(text, CPU)
    cache.add(["red dog"])
    monkeypatch.setattr(cache, "_device", torch.device("cuda"))
    monkeypatch.setattr("latentgen.train.objectives.text_conditioning.get_worker_info", lambda: "one of two")
    cache.encode(["red dog"])
    with pytest.raises(ConfigError, match=r"cuda.*workers"):
        cache.encode(["cat"])
