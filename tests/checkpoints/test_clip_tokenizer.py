"""The bundled tokenizer against transformers' own, loaded from files as they are published."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from latentgen.checkpoints.families import CLIP_PAD, MERGES, OPENCLIP_PAD, clip_tokenizer

PROMPTS = [
    "a photo of a cat",
    "",
    "A PHOTO, of 2 cats & a dog's-house!! (masterpiece:1.2)",
    "naïve café — 日本語 🐯\n\ttabs   and spaces",
    "supercalifragilisticexpialidocious 0123456789 <|endoftext|> !",
    "x" * 300,
]


@pytest.fixture(scope="module", params=[CLIP_PAD, OPENCLIP_PAD])
def pad_token(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, pad_token: str) -> Path:
    """A tokenizer's folder as in a published checkpoint, with a vocabulary built here."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    path = tmp_path_factory.mktemp("tokenizer")
    merges = gzip.decompress(MERGES.read_bytes()).decode()
    letters = list(bytes_to_unicode().values())
    vocabulary = letters + [letter + "</w>" for letter in letters]
    vocabulary += [line.replace(" ", "") for line in merges.splitlines()]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    (path / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(vocabulary)}))
    (path / "merges.txt").write_text("#version: 0.2\n" + merges)
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    special["pad_token"] = pad_token
    (path / "special_tokens_map.json").write_text(json.dumps(special))
    config = {**special, "model_max_length": 77, "tokenizer_class": "CLIPTokenizer", "do_lower_case": True}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def test_ids_are_those_of_clip() -> None:
    tokenizer = clip_tokenizer(pad_token=CLIP_PAD)
    assert len(tokenizer) == 49408
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert tokenizer("hello world!").input_ids == [49406, 3306, 1002, 256, 49407]
    assert tokenizer.convert_tokens_to_ids(["!", "!</w>", "in", "<|startoftext|>"]) == [0, 256, 512, 49406]


def test_agrees_with_the_files_read_by_transformers(folder: Path, pad_token: str) -> None:
    from transformers import CLIPTokenizer

    expected = CLIPTokenizer.from_pretrained(folder)
    found = clip_tokenizer(pad_token=pad_token)
    assert found.get_vocab() == expected.get_vocab()
    for prompt in PROMPTS:
        assert found(prompt).input_ids == expected(prompt).input_ids, prompt
    padded = {"padding": "max_length", "truncation": True}
    assert found(PROMPTS, **padded).input_ids == expected(PROMPTS, **padded).input_ids
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "model_max_length")
    for name in names:
        assert getattr(found, name) == getattr(expected, name), name


def test_padding_tokens() -> None:
    assert clip_tokenizer(pad_token=CLIP_PAD).pad_token_id == 49407
    assert clip_tokenizer(pad_token=OPENCLIP_PAD).pad_token_id == 0
