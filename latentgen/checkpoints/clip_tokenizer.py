"""CLIP's tokenizer, made of the merges inside this package, for files that come without one."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

MERGES = Path(__file__).parent / "clip_merges" / "merges.txt.gz"
SPECIAL_TOKENS = ("<|startoftext|>", "<|endoftext|>")
# What fills a window after the end of the text: in OpenAI's tower, and in those of OpenCLIP.
CLIP_PAD = "<|endoftext|>"
OPENCLIP_PAD = "!"
WINDOW = 77
_END_OF_WORD = "</w>"
# Bytes that stand for themselves; the others are spelt with the characters from U+0100 on.
_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))


def clip_tokenizer(*, pad_token: str) -> CLIPTokenizer:
    """The tokenizer that all of CLIP's text towers share (arXiv:2103.00020, section 2.4): 49,408 tokens.

    Args:
        pad_token: ``CLIP_PAD`` or ``OPENCLIP_PAD``, as the tower was trained.
    """
    from transformers import CLIPTokenizer

    lines = gzip.decompress(MERGES.read_bytes()).decode("utf-8").splitlines()
    merges: Any = [tuple(line.split(" ")) for line in lines]
    letters = _byte_letters()
    pieces = [*letters, *(letter + _END_OF_WORD for letter in letters), *map("".join, merges)]
    vocab = {piece: index for index, piece in enumerate([*pieces, *SPECIAL_TOKENS])}
    return CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad_token, model_max_length=WINDOW)


def _byte_letters() -> list[str]:
    """A visible character for each of the 256 bytes, in the order of the vocabulary."""
    others = 256 - len(_PRINTABLE)
    return [chr(byte) for byte in _PRINTABLE] + [chr(0x100 + i) for i in range(others)]
