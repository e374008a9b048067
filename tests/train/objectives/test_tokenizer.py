"""The tokenizer made from captions: any text has a spelling, the same in every process."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentgen.errors import ConfigError
from latentgen.models.text_loading import load_tokenizer
from latentgen.train.objectives.text_to_image import MIN_VOCAB_SIZE, train_tokenizer

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

CORPUS = [
    "slice of pizza",
    "tiger face",
    "slice of lemon",
    "tiger",
    "leopard",
    "face with tears of joy",
    "naïve 漢字",
    "hippopotamus",
]


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return train_tokenizer(CORPUS, vocab_size=560, max_length=12)


def test_special_tokens_and_window(tokenizer: CLIPTokenizer):
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 1)
    assert tokenizer.model_max_length == 12
    assert len(tokenizer) == 560
    ids = tokenizer("tiger", padding="max_length").input_ids
    assert (ids[0], ids[2:]) == (0, [1] * 10)


def test_common_words_become_one_token(tokenizer: CLIPTokenizer):
    assert tokenizer.tokenize("Slice OF Tiger") == ["slice</w>", "of</w>", "tiger</w>"]


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=("Cc", "Cs")), max_size=30))
def test_any_unicode_survives(tokenizer: CLIPTokenizer, text: str):
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    byte_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
    letters = "".join(piece.removesuffix("</w>") for piece in tokenizer.tokenize(text))
    spelled = bytes(byte_of[letter] for letter in letters).decode("utf-8")
    normalised = tokenizer.backend_tokenizer.normalizer.normalize_str(text)
    assert spelled == "".join(normalised.split())


def test_the_same_corpus_gives_the_same_tokenizer():
    # Many equally common pairs: the order of a hash table would show.
    corpus = [f"{a}{b} {b}{a}" for a in "abcdefgh" for b in "ijklmnop"]
    vocabularies = [train_tokenizer(corpus, vocab_size=600, max_length=8).get_vocab() for _ in range(4)]
    assert all(vocabulary == vocabularies[0] for vocabulary in vocabularies)


def test_loads_in_transformers_from_disk(tokenizer: CLIPTokenizer, tmp_path: Path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(str(tmp_path))
    texts = ["slice of pizza", "", "Ünïcode 🍕 text", "a" * 40]
    for loaded in (load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(str(tmp_path))):
        assert loaded(texts).input_ids == tokenizer(texts).input_ids
        assert loaded.model_max_length == 12
        assert loaded.get_vocab() == tokenizer.get_vocab()


def test_a_vocabulary_smaller_than_the_bytes_is_refused():
    assert len(train_tokenizer(CORPUS, vocab_size=MIN_VOCAB_SIZE, max_length=8)) == MIN_VOCAB_SIZE
    with pytest.raises(ConfigError, match="vocab_size is 513"):
        train_tokenizer(CORPUS, vocab_size=MIN_VOCAB_SIZE - 1, max_length=8)
