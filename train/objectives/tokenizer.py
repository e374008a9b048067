"""A byte-pair tokenizer in CLIP's format, made from the captions that a model is trained on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from latentgen.errors import ConfigError

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

BOS = "<|startoftext|>"
EOS = "<|endoftext|>"
END_OF_WORD = "</w>"
# Every byte, alone and at the end of a word, and the two special tokens.
SMALLEST_VOCABULARY = 2 + 2 * 256


def train_tokenizer(corpus: Sequence[str], *, vocab_size: int, max_length: int) -> CLIPTokenizer:
    """Merge the commonest pairs (arXiv:1508.07909) until there are `vocab_size` tokens.

    Every byte is a token, alone and at the end of a word, so that any Unicode text has a spelling. The same corpus
    gives the same tokenizer in every process: a run that resumes, and all processes of one run, spell alike.

    Args:
        corpus: the captions.
        vocab_size: tokens at most, the two special ones and the 512 bytes included.
        max_length: tokens of the text encoder's window.

    Raises:
        ConfigError: `vocab_size` leaves no room for the bytes.
    """
    from tokenizers import pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    if vocab_size < SMALLEST_VOCABULARY:
        raise ConfigError(
            f"text_encoder.vocab_size is {vocab_size}; the bytes and the special tokens alone are "
            f"{SMALLEST_VOCABULARY}"
        )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        # Left to itself, the trainer numbers the ends of words in the order of a hash table that differs in each
        # process, and breaks the ties between pairs by these numbers. Special tokens are numbered as listed.
        special_tokens=[BOS, EOS, *alphabet, *(byte + END_OF_WORD for byte in alphabet)],
        end_of_word_suffix=END_OF_WORD,
        show_progress=False,
    )
    learner = CLIPTokenizer().backend_tokenizer
    learner.train_from_iterator(corpus, trainer)
    learnt = json.loads(learner.to_str())["model"]
    merges: Any = [(left, right) for left, right in learnt["merges"]]
    return CLIPTokenizer(vocab=learnt["vocab"], merges=merges, model_max_length=max_length)
