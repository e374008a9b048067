"""Prompts as tokens: what a prompt may hold, and chunks for prompts longer than the text encoder's window."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from latentgen.errors import ConfigError, InputError

T = TypeVar("T")


class Piece(NamedTuple):
    """A text, and what the hidden states of its tokens are multiplied by."""

    text: str
    weight: float = 1.0


@dataclass(frozen=True)
class WeightedPrompt:
    """A prompt as the text encoder takes it.

    Attributes:
        parts: each begins a chunk of its own, however short the one before is; of one piece or more.
    """

    parts: tuple[tuple[Piece, ...], ...]

    @property
    def text(self) -> str:
        """All of its text, without the weights."""
        return "".join(piece.text for part in self.parts for piece in part)

    @property
    def is_weighted(self) -> bool:
        """Whether any weight is other than 1."""
        return any(piece.weight != 1.0 for part in self.parts for piece in part)


def plain_prompt(text: str) -> WeightedPrompt:
    """A prompt in which every sign is text."""
    return WeightedPrompt(((Piece(text),),))


def as_weighted(prompts: Sequence[str | WeightedPrompt]) -> list[WeightedPrompt]:
    """Prompts as the text encoder takes them; a str is text without any weights.

    Raises:
        InputError: as :func:`check_prompts`.
    """
    check_prompts(prompts)
    return [plain_prompt(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]


def check_prompts(prompts: Sequence[str | WeightedPrompt]) -> None:
    """Refuse what no tokenizer can read; the empty prompt and any Unicode text are fine.

    Raises:
        InputError: there is no prompt, or one is not text, holds NUL, or holds half of a surrogate pair.
    """
    if isinstance(prompts, str) or not prompts:
        raise InputError(f"prompts: expected a non-empty sequence of strings, found {prompts!r}")
    for index, given in enumerate(prompts):
        prompt = given.text if isinstance(given, WeightedPrompt) else given
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
    rows: Sequence[Sequence[Sequence[T]]], window: int, *, bos: T, eos: T, pad: T
) -> list[list[list[T]]]:
    """Cut token rows into chunks that fill the text encoder's window; nothing is dropped.

    A row of one part of at most `window` - 2 tokens makes one chunk, as a tokenizer that pads makes of it. A longer
    part makes several, each with its own `bos` and `eos`, and every part begins a new one. All rows get as many
    chunks as the longest one. What stands for each token may be its id or its weight.

    Args:
        rows: B rows of parts of token ids without special tokens.
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

    def chunk(tokens: Sequence[T]) -> list[T]:
        text = [bos, *tokens, eos]
        return text + [pad] * (window - len(text))

    chunked = [
        [chunk(part[start : start + size]) for part in row for start in range(0, max(1, len(part)), size)]
        for row in rows
    ]
    count = max(map(len, chunked))
    return [row + [chunk(())] * (count - len(row)) for row in chunked]


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
