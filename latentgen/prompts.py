"""Prompts as tokens: what a prompt may hold, and chunks for prompts longer than the text encoder's window."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from latentgen.errors import ConfigError, InputError


def check_prompts(prompts: Sequence[str]) -> None:
    """Refuse what no tokenizer can read; the empty prompt and any Unicode text are fine.

    Raises:
        InputError: there is no prompt, or one is not text, holds NUL, or holds half of a surrogate pair.
    """
    if isinstance(prompts, str) or not prompts:
        raise InputError(f"prompts: expected a non-empty sequence of strings, found {prompts!r}")
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise InputError(f"prompt {index}: expected a string, found {type(prompt).__name__}")
        if "\0" in prompt:
            raise InputError(f"prompt {index}: NUL at position {prompt.index(chr(0))}; remove it")
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(
                f"prompt {index}: half of a surrogate pair at position {error.start}; decode it as UTF-8"
            ) from None


def chunk_tokens(
    rows: Sequence[Sequence[int]], window: int, *, bos: int, eos: int, pad: int
) -> list[list[list[int]]]:
    """Cut token rows into chunks that fill the text encoder's window; nothing is dropped.

    A row of at most `window` - 2 tokens makes one chunk, as a tokenizer that pads makes of it. A longer row
    makes several, each with its own `bos` and `eos`. All rows get as many chunks as the longest one.

    Args:
        rows: B rows of token ids without special tokens.
        window: tokens that the text encoder reads at once.
        bos: id that begins a chunk.
        eos: id that ends the text of a chunk.
        pad: id that fills a chunk after its end.

    Returns:
        [B][chunks][window] token ids.

    Raises:
        ConfigError: the window has no room for a token between `bos` and `eos`.
    """
    size = window - 2
    if size < 1:
        raise ConfigError(f"the text encoder's window of {window} tokens is too short; at least 3 are needed")
    count = max(1, *(-(-len(row) // size) for row in rows))

    def chunk(row: Sequence[int], start: int) -> list[int]:
        text = [bos, *row[start : start + size], eos]
        return text + [pad] * (window - len(text))

    return [[chunk(row, index * size) for index in range(count)] for row in rows]


def token_expansions(added: Mapping[str, int]) -> dict[int, tuple[int, ...]]:
    """Which token stands for several, told by their names as diffusers does: "<cat>" for "<cat>", "<cat>_1", ...

    Args:
        added: the tokens that were added to a vocabulary, and their ids.

    Returns:
        The id of each such first token -> the ids of all that it stands for, its own included.
    """
    expansions: dict[int, tuple[int, ...]] = {}
    for token, first in added.items():
        ids = [first]
        while (following := added.get(f"{token}_{len(ids)}")) is not None:
            ids.append(following)
        if len(ids) > 1:
            expansions[first] = tuple(ids)
    return expansions


def expand_tokens(
    rows: Sequence[Sequence[int]], expansions: Mapping[int, tuple[int, ...]]
) -> list[list[int]]:
    """Replace each token that stands for several by all of them."""
    return [[part for token in row for part in expansions.get(token, (token,))] for row in rows]
