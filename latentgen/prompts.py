"""Prompts: their syntax, their weights, and chunks for prompts longer than the text encoder's window.

The syntax is that of A1111's web UI: `(w)`, `(w:1.2)` and `[w]` are weights, `BREAK` begins a chunk, `[from:to:when]`
and `[one|other]` switch. As in A1111, switches are resolved first, in the text, and weights are read from the result.
Parsing takes time linear in the prompt's length, and does not recurse.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar, get_args

from latentgen.errors import ConfigError, InputError
from latentgen.files import quote
from latentgen.prompt_switches import NUMBER, resolve_switches

T = TypeVar("T")

# "explicit" reads `(w:1.2)`, and `\(` and `\)` as parentheses; all other characters are text. "a1111" reads all of
# A1111's syntax, and "plain" nothing.
PromptSyntax = Literal["explicit", "a1111", "plain"]
DEFAULT_SYNTAX: PromptSyntax = "explicit"

# Far above any useful value; keeps the context finite in float16.
MAX_WEIGHT = 1000.0
_BARE = {"(": 1.1, "[": 1 / 1.1}
# No repetition can match the same characters in two ways, which would take quadratic time.
_TOKENS = re.compile(rf"\\[\\()\[\]]|:\s*{NUMBER}\s*\)|[()\[\]:\\]|[^()\[\]:\\]+")
_BREAK = re.compile(r"\bBREAK\b")


class Piece(NamedTuple):
    """A text, and the weight that the hidden states of its tokens are multiplied by."""

    text: str
    weight: float = 1.0


@dataclass(frozen=True)
class WeightedPrompt:
    """A prompt with weights, the input of a text encoder.

    Attributes:
        parts: each begins a new chunk and has at least one piece.
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


@dataclass(frozen=True)
class PromptSchedule:
    """A prompt over the steps of a run.

    Attributes:
        changes: (step, prompt from that step on), in increasing order; the first step is 0.
    """

    changes: tuple[tuple[int, WeightedPrompt], ...]

    def at(self, step: int) -> WeightedPrompt:
        """The prompt at a step, counted from 0."""
        return self.changes[bisect_right(self.changes, step, key=lambda change: change[0]) - 1][1]


def plain_prompt(text: str) -> WeightedPrompt:
    """A prompt without markup."""
    return WeightedPrompt(((Piece(text),),))


def as_weighted(prompts: Sequence[str | WeightedPrompt]) -> list[WeightedPrompt]:
    """The input of a text encoder; a str is text without weights.

    Raises:
        InputError: as :func:`check_prompts`.
    """
    check_prompts(prompts)
    return [plain_prompt(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]


def check_prompts(prompts: Sequence[str | WeightedPrompt]) -> None:
    """Check for prompts that no tokenizer can read; the empty prompt and any Unicode text are valid.

    Raises:
        InputError: there is no prompt, or one is not text, has NUL, or has half of a surrogate pair.
    """
    if isinstance(prompts, str) or not prompts:
        raise InputError(f"prompts must be a non-empty sequence of strings, not {prompts!r}")
    for index, prompt in enumerate(prompts):
        text = prompt.text if isinstance(prompt, WeightedPrompt) else prompt
        if not isinstance(text, str):
            raise InputError(f"prompt {index} must be a string, not {type(text).__name__}")
        if "\0" in text:
            raise InputError(f"prompt {index} has NUL at position {text.index(chr(0))}; remove it")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(
                f"prompt {index} has half of a surrogate pair at position {error.start}; decode it as UTF-8"
            ) from None


def read_prompt(text: str, syntax: PromptSyntax, steps: int) -> PromptSchedule:
    """Read a prompt for a run of `steps` steps.

    Raises:
        InputError: the syntax is unknown, a weight is out of range, or a long prompt switches too often.
    """
    if syntax not in get_args(PromptSyntax):
        raise InputError(
            f"prompt_syntax={syntax!r} is unknown; choose from {', '.join(get_args(PromptSyntax))}"
        )
    if syntax == "plain":
        return PromptSchedule(((0, plain_prompt(text)),))
    if syntax == "explicit":
        return PromptSchedule(((0, read_weights(text)),))
    changes = resolve_switches(text, steps)
    prompts = {
        current: read_weights(current, bare=True) for current in dict.fromkeys(text for _, text in changes)
    }
    return PromptSchedule(tuple((step, prompts[current]) for step, current in changes))


def read_weights(text: str, *, bare: bool = False) -> WeightedPrompt:
    """Read the weights of a prompt: `(w:1.2)`; nested ones are multiplied.

    Args:
        text: the prompt.
        bare: also read `(w)` as 1.1, `[w]` as 1 / 1.1, and `BREAK`. Brackets that are not closed reach to the end.

    Raises:
        InputError: a weight is not in -MAX_WEIGHT..MAX_WEIGHT.
    """
    tokens = _TOKENS.findall(text)
    factors, ends = _groups(tokens, bare=bare)
    # Round and square brackets may cross, so each kind has its own stack.
    rounds, squares = [1.0], [1.0]
    parts: list[list[Piece]] = [[]]
    words: list[str] = []
    current = 1.0
    for index, token in enumerate(tokens):
        if index in factors:
            stack = rounds if token == "(" else squares
            stack.append(stack[-1] * factors[index])
            continue
        if index in ends:
            (squares if token == "]" else rounds).pop()
            continue
        weight = rounds[-1] * squares[-1]
        if weight != current:
            _close(words, current, parts[-1])
            current = weight
        if len(token) == 2 and token[0] == "\\" and (bare or token[1] in "()"):
            token = token[1]
        if bare and "BREAK" in token:
            *closed, token = _BREAK.split(token)
            for text in closed:
                words.append(text)
                _close(words, current, parts[-1])
                parts.append([])
        words.append(token)
    _close(words, current, parts[-1])
    if len(parts) > 1 and not any(piece.text.strip() for piece in parts[-1]):
        parts.pop()
    return WeightedPrompt(tuple(tuple(part) or (Piece(""),) for part in parts))


def _close(words: list[str], weight: float, part: list[Piece]) -> None:
    """Move the words that share a weight to the end of a part."""
    text = "".join(words)
    words.clear()
    if not text:
        return
    if not abs(weight) <= MAX_WEIGHT:
        raise InputError(
            f"the weight {weight:g} of {quote(text[:40])} must be from {-MAX_WEIGHT:g} to {MAX_WEIGHT:g}; "
            'use fewer parentheses, or prompt_syntax="plain" if they are text'
        )
    part.append(Piece(text, weight))


def _groups(tokens: Sequence[str], *, bare: bool) -> tuple[dict[int, float], set[int]]:
    """Which tokens begin a group, with its weight, and which end one; all others are text."""
    factors: dict[int, float] = {}
    ends: set[int] = set()
    opened: dict[str, list[int]] = {"(": [], "[": []}
    for index, token in enumerate(tokens):
        if token in opened:
            opened[token].append(index)
        elif token == "]" and bare and opened["["]:
            factors[opened["["].pop()] = _BARE["["]
            ends.add(index)
        elif token[-1] == ")" and token[0] != "\\" and opened["("]:
            begin = opened["("].pop()
            if bare or len(token) > 1:
                factors[begin] = float(token[1:-1]) if len(token) > 1 else _BARE["("]
                ends.add(index)
    if bare:
        factors |= {index: _BARE[token] for token, indices in opened.items() for index in indices}
    return factors, ends


def chunk_tokens(
    rows: Sequence[Sequence[Sequence[T]]], window: int, *, bos: T, eos: T, pad: T
) -> list[list[list[T]]]:
    """Split token rows into chunks that fill the text encoder's window; nothing is dropped.

    A row of one part of at most `window` - 2 tokens makes one chunk, as with a tokenizer that pads. A longer part makes
    several, each with its own `bos` and `eos`, and every part begins a new one. All rows get as many chunks as the
    longest one.

    Args:
        rows: B rows of parts of token ids (or weights) without special tokens.
        window: tokens that the text encoder reads at once.
        bos: begins a chunk.
        eos: ends the text of a chunk.
        pad: fills a chunk after its end.

    Returns:
        [B][chunks][window] token ids.

    Raises:
        ConfigError: the window has no room for a token between `bos` and `eos`.
    """
    size = window - 2
    if size < 1:
        raise ConfigError(f"the text encoder's window of {window} tokens is too short; it must be at least 3")

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
    """Embeddings of several vectors, by diffusers' names: "<cat>" expands to "<cat>", "<cat>_1", "<cat>_2", ...

    Args:
        added: the tokens that were added to a vocabulary, and their ids.

    Returns:
        The id of each such first token -> the ids of its expansion, its own first.
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
    """Replace each token by its expansion, if it has one."""
    return [[part for token in row for part in expansions.get(token, (token,))] for row in rows]
