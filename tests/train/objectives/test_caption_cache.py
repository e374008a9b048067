"""The conditioning of captions, encoded once: the same with a cache on disk, without one, and from the encoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from latentgen.checkpoints.folder import CheckpointFolder
from latentgen.errors import ConfigError, InputError
from latentgen.models.text import CLIPText, CLIPTextPair, Conditioning, TextEncoder
from latentgen.pipelines.load_save import LoadOptions, load_text_encoder
from latentgen.train.objectives.text_conditioning import CaptionCache
from tests.pipelines.sdxl import build_base

CPU = torch.device("cpu")
LONG = "a red dog and a tiger " * 30
CAPTIONS = ["red dog", "", "tiger", LONG, "red dog", "cat " * 100]


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


def test_damaged_entries_are_computed_again(text: TextEncoder, tmp_path: Path):
    expected = CaptionCache(text, CPU, tmp_path).encode(CAPTIONS)
    for file in tmp_path.rglob("*.safetensors"):
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    with pytest.warns(UserWarning, match="damaged and is deleted"):
        fixed = CaptionCache(text, CPU, tmp_path).encode(CAPTIONS)
    assert_same(fixed, expected)


def test_captions_that_cannot_be_encoded(text: TextEncoder):
    with pytest.raises(InputError, match="NUL"):
        CaptionCache(text, CPU).add(["a\0b"])


def test_workers_cannot_use_an_accelerator(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    text = load_text_encoder(CheckpointFolder.open(tiny_checkpoint), LoadOptions(torch.float32, CPU))
    cache = CaptionCache(text, CPU)
    cache.add(["red dog"])
    monkeypatch.setattr(cache, "_device", torch.device("cuda"))
    monkeypatch.setattr("latentgen.train.distributed.get_worker_info", lambda: "one of two")
    cache.encode(["red dog"])
    with pytest.raises(ConfigError, match=r"cuda.*workers"):
        cache.encode(["cat"])
