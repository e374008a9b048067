"""A byte-pair tokenizer in CLIP's format, made from the captions that a model is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

BOS = "<|startoftext|>"
EOS = "<|endoftext|>"
END_OF_WORD = "</w>"


def train_tokenizer(corpus: Sequence[str], *, vocab_size: int, max_length: int) -> CLIPTokenizer:
    """Merge the commonest pairs (arXiv:1508.07909) until there are `vocab_size` tokens.

    Every byte is a token, alone and at the end of a word, so that any Unicode text has a spelling.

    Args:
        corpus: the captions.
        vocab_size: tokens at most, the two special ones and the 512 bytes included.
        max_length: tokens of the text encoder's window.
    """
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    learner = CLIPTokenizer().train_new_from_iterator(
        [list(corpus)],
        vocab_size=vocab_size - 256,
        length=1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    learnt = sorted(learner.get_vocab(), key=learner.get_vocab().__getitem__)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = dict.fromkeys([BOS, EOS, *alphabet, *(byte + END_OF_WORD for byte in alphabet), *learnt])
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=_merges(learner),
        model_max_length=max_length,
    )


def _merges(tokenizer: CLIPTokenizer) -> list[tuple[str, str]]:
    import json

    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    return [(left, right) for left, right in merges]
