"""What the signs in a prompt mean: weights, chunks, and text that switches while an image is drawn.

The syntax is that of A1111's web UI: `(w)`, `(w:1.2)` and `[w]` weigh, `BREAK` begins a chunk, `[from:to:when]` and
`[one|other]` switch. As there, switches are settled first, in the text, and weights are read from what is left. All
of it takes time in proportion to the prompt's length, and no recursion.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple, get_args

from latentgen.errors import InputError
from latentgen.files import quote
from latentgen.prompts import Piece, WeightedPrompt, plain_prompt

# "explicit" reads `(w:1.2)`, and `\(` and `\)` as parentheses; every other sign is text. "a1111" reads all that A1111
# does, and "plain" nothing.
PromptSyntax = Literal["explicit", "a1111", "plain"]
DEFAULT_SYNTAX: PromptSyntax = "explicit"

# Far beyond any use; it keeps the context finite in float16.
MAX_WEIGHT = 1000.0
# A prompt's length times the number of its texts: what keeps the time to settle switches within bounds.
MAX_SWITCHED_CHARACTERS = 2**21

_BARE = {"(": 1.1, "[": 1 / 1.1}

# Written so that none of its repetitions can match the same signs in two ways, which would take quadratic time.
_NUMBER = r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
_WEIGHT_SIGNS = re.compile(rf"\\[\\()\[\]]|:\s*{_NUMBER}\s*\)|[()\[\]:\\]|[^()\[\]:\\]+")
_SWITCH_SIGNS = re.compile(r"\\.|[\[\]():|\\]|[^\[\]():|\\]+", re.DOTALL)
_WHEN = re.compile(rf"\s*({_NUMBER})\s*")
# Without any of this nothing switches.
_MAY_SWITCH = re.compile(rf"\||:\s*{_NUMBER}\s*\]")
_BREAK = re.compile(r"\bBREAK\b")


@dataclass(frozen=True)
class PromptSchedule:
    """A prompt over the steps of a run.

    Attributes:
        changes: at which step which prompt begins to hold; the first is 0, and they rise.
    """

    changes: tuple[tuple[int, WeightedPrompt], ...]

    def at(self, step: int) -> WeightedPrompt:
        """The prompt that holds at a step, counted from 0."""
        return self.changes[bisect_right(self.changes, step, key=lambda change: change[0]) - 1][1]


def read_prompt(text: str, syntax: PromptSyntax, steps: int) -> PromptSchedule:
    """Read a prompt for a run of so many steps.

    Raises:
        InputError: the syntax is unknown, a weight is out of bounds, or a long prompt switches too often.
    """
    if syntax not in get_args(PromptSyntax):
        raise InputError(
            f"prompt_syntax={syntax!r} is not known; choose from {', '.join(get_args(PromptSyntax))}"
        )
    if syntax == "plain":
        return PromptSchedule(((0, plain_prompt(text)),))
    if syntax == "explicit":
        return PromptSchedule(((0, read_weights(text)),))
    read: dict[str, WeightedPrompt] = {}
    changes: list[tuple[int, WeightedPrompt]] = []
    for step, current in settle_switches(text, steps):
        prompt = read[current] = read.get(current) or read_weights(current, bare=True)
        changes.append((step, prompt))
    return PromptSchedule(tuple(changes))


def read_weights(text: str, *, bare: bool = False) -> WeightedPrompt:
    """Read the weights of a prompt: `(w:1.2)`; nested ones are multiplied.

    Args:
        text: the prompt.
        bare: read `(w)` as 1.1, `[w]` as 1 / 1.1, and `BREAK` too. What is not closed reaches to the end.

    Raises:
        InputError: a weight is not in -MAX_WEIGHT..MAX_WEIGHT.
    """
    signs = _WEIGHT_SIGNS.findall(text)
    factors, ends = _groups(signs, bare=bare)
    # Round and square brackets may cross, so each kind has a stack of its own.
    rounds, squares = [1.0], [1.0]
    parts: list[list[Piece]] = [[]]
    words: list[str] = []
    current = 1.0
    for index, sign in enumerate(signs):
        if index in factors:
            stack = rounds if sign == "(" else squares
            stack.append(stack[-1] * factors[index])
            continue
        if index in ends:
            (squares if sign == "]" else rounds).pop()
            continue
        weight = rounds[-1] * squares[-1]
        if weight != current:
            _close(words, current, parts[-1])
            current = weight
        if len(sign) == 2 and sign[0] == "\\" and (bare or sign[1] in "()"):
            sign = sign[1]
        if bare and "BREAK" in sign:
            *whole, sign = _BREAK.split(sign)
            for text in whole:
                words.append(text)
                _close(words, current, parts[-1])
                parts.append([])
        words.append(sign)
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
            f"the prompt gives {quote(text[:40])} the weight {weight:g}; it must be from {-MAX_WEIGHT:g} to "
            f'{MAX_WEIGHT:g}: use fewer parentheses, or prompt_syntax="plain" if they are meant as text'
        )
    part.append(Piece(text, weight))


def _groups(signs: Sequence[str], *, bare: bool) -> tuple[dict[int, float], set[int]]:
    """Which signs begin a group, with its weight, and which end one; all others are text."""
    factors: dict[int, float] = {}
    ends: set[int] = set()
    opened: dict[str, list[int]] = {"(": [], "[": []}
    for index, sign in enumerate(signs):
        if sign in opened:
            opened[sign].append(index)
        elif sign == "]" and bare and opened["["]:
            factors[opened["["].pop()] = _BARE["["]
            ends.add(index)
        elif sign[-1] == ")" and sign[0] != "\\" and opened["("]:
            begin = opened["("].pop()
            if bare or len(sign) > 1:
                factors[begin] = float(sign[1:-1]) if len(sign) > 1 else _BARE["("]
                ends.add(index)
    if bare:
        factors |= {index: _BARE[sign] for sign, indices in opened.items() for index in indices}
    return factors, ends


class _Switch(NamedTuple):
    """Brackets of which one branch holds at a time.

    branches: where the signs of each begin and end.
    when: the step at which the second takes over from the first; None takes turns at every step.
    after: the sign behind the brackets.
    """

    branches: tuple[tuple[int, int], ...]
    when: int | None
    after: int

    def branch(self, step: int) -> tuple[int, int]:
        return self.branches[step % len(self.branches) if self.when is None else step >= self.when]


def settle_switches(text: str, steps: int) -> list[tuple[int, str]]:
    """What is left of a prompt with `[from:to:when]` and `[one|other]`, from which step on.

    `when` is a number of steps, or with a point in it a share of them. `from` may be empty or absent, and `to` may be
    empty. Steps are counted from 0, and so is the first entry.

    Raises:
        InputError: the prompt is too long to switch so often.
    """
    if not _MAY_SWITCH.search(text):
        return [(0, text)]
    signs = _SWITCH_SIGNS.findall(text)
    switches = _find_switches(signs, steps)
    if any(switch.when is None for switch in switches.values()):
        beginnings = set(range(steps))
    else:
        whens = (switch.when for switch in switches.values())
        beginnings = {0, *(when for when in whens if when is not None and 0 < when < steps)}
    if len(beginnings) > 1 and len(beginnings) * len(text) > MAX_SWITCHED_CHARACTERS:
        raise InputError(
            f"a prompt of {len(text):,} characters switches at {len(beginnings) - 1:,} of {steps:,} steps; shorten it "
            'or switch less often, or use prompt_syntax="plain" if its brackets are meant as text'
        )
    settled: list[tuple[int, str]] = []
    for step in sorted(beginnings):
        current = _text_at(signs, switches, step)
        if not settled or settled[-1][1] != current:
            settled.append((step, current))
    return settled


def _find_switches(signs: Sequence[str], steps: int) -> dict[int, _Switch]:
    """The switches by the sign that begins them."""
    switches: dict[int, _Switch] = {}
    # Each bracket that is open, and how many of the separators stand before it.
    opened: list[tuple[int, int]] = []
    separators: list[int] = []
    depths = {"(": 0, "[": 0}
    partners = {")": "(", "]": "["}
    for index, sign in enumerate(signs):
        if sign in depths:
            opened.append((index, len(separators)))
            depths[sign] += 1
        elif sign in (":", "|"):
            separators.append(index)
        elif (partner := partners.get(sign)) and depths[partner]:
            # What was opened since, and never closed, is text.
            while True:
                begin, height = opened.pop()
                depths[signs[begin]] -= 1
                inside = separators[height:]
                del separators[height:]
                if signs[begin] == partner:
                    break
            if sign == "]" and (switch := _as_switch(signs, begin, inside, index, steps)):
                switches[begin] = switch
    return switches


def _as_switch(
    signs: Sequence[str], begin: int, separators: Sequence[int], end: int, steps: int
) -> _Switch | None:
    """What brackets from `begin` to `end` switch; None for those that weigh."""
    kinds = {signs[index] for index in separators}
    borders = [begin, *separators, end]
    branches = [(left + 1, right) for left, right in pairwise(borders)]
    if kinds == {"|"}:
        return _Switch(tuple(branches), None, end + 1)
    if kinds != {":"} or len(branches) > 3:
        return None
    number = _WHEN.fullmatch("".join(signs[slice(*branches[-1])]))
    if number is None:
        return None
    nothing = (begin + 1, begin + 1)
    return _Switch(
        (*([nothing] if len(branches) == 2 else []), *branches[:-1]), _step(number[1], steps), end + 1
    )


def _step(when: str, steps: int) -> int:
    """The step that a number means: so many steps, or with a point so large a share of them."""
    if "." not in when:
        return int(min(float(when), steps))
    # Rounded before it is cut, or else 0.29 of 100 steps were 28.
    return math.floor(round(min(max(float(when), 0.0), 1.0) * steps, 6))


def _text_at(signs: Sequence[str], switches: dict[int, _Switch], step: int) -> str:
    """The text at a step, with one branch in the place of each switch."""
    kept: list[str] = []
    # The branches that are being read: where each ends, and where it goes on from there.
    inside: list[tuple[int, int]] = []
    index = 0
    while index < len(signs):
        if inside and index == inside[-1][0]:
            index = inside.pop()[1]
        elif switch := switches.get(index):
            index, end = switch.branch(step)
            inside.append((end, switch.after))
        else:
            kept.append(signs[index])
            index += 1
    return "".join(kept)
