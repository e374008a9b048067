"""Prompts that switch during a run, in A1111's syntax: `[from:to:when]` and `[one|other]`."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from latentgen.errors import InputError

# A prompt's length times the number of its texts; it bounds the time to resolve switches.
MAX_SWITCHED_CHARACTERS = 2**21

# In all patterns no repetition can match the same characters in two ways, which would take quadratic time.
NUMBER = r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
_TOKENS = re.compile(r"\\.|[\[\]():|\\]|[^\[\]():|\\]+", re.DOTALL)
_WHEN = re.compile(rf"\s*({NUMBER})\s*")
# Without any of these nothing switches.
_MAY_SWITCH = re.compile(rf"\||:\s*{NUMBER}\s*\]")


class _Switch(NamedTuple):
    """Brackets with alternatives, one of which is read at each step.

    branches: start and stop of the tokens of each alternative.
    when: the step from which the second one is read; None alternates at every step.
    after: the token behind the brackets.
    """

    branches: tuple[tuple[int, int], ...]
    when: int | None
    after: int

    def branch(self, step: int) -> tuple[int, int]:
        return self.branches[step % len(self.branches) if self.when is None else step >= self.when]


def resolve_switches(text: str, steps: int) -> list[tuple[int, str]]:
    """The text of a prompt with `[from:to:when]` and `[one|other]`, as (step, text from that step on).

    `when` is a number of steps, or with a decimal point a fraction of them. `from` may be empty or absent, and `to` may
    be empty. The first step is 0.

    Raises:
        InputError: the prompt is too long to switch so often.
    """
    if not _MAY_SWITCH.search(text):
        return [(0, text)]
    tokens = _TOKENS.findall(text)
    switches = _find_switches(tokens, steps)
    whens = {switch.when for switch in switches.values()}
    changes = range(steps) if None in whens else sorted({0, *(w for w in whens if w and 0 < w < steps)})
    if len(changes) > 1 and len(changes) * len(text) > MAX_SWITCHED_CHARACTERS:
        raise InputError(
            f"a prompt of {len(text):,} characters switches at {len(changes) - 1:,} of {steps:,} steps; shorten it "
            'or switch less often, or use prompt_syntax="plain" if its brackets are text'
        )
    resolved: list[tuple[int, str]] = []
    for step in changes:
        current = _text_at(tokens, switches, step)
        if not resolved or resolved[-1][1] != current:
            resolved.append((step, current))
    return resolved


def _find_switches(tokens: Sequence[str], steps: int) -> dict[int, _Switch]:
    """The switches by the token that begins them."""
    switches: dict[int, _Switch] = {}
    # Each open bracket, and the number of separators before it.
    opened: list[tuple[int, int]] = []
    separators: list[int] = []
    depths = {"(": 0, "[": 0}
    partners = {")": "(", "]": "["}
    for index, token in enumerate(tokens):
        if token in depths:
            opened.append((index, len(separators)))
            depths[token] += 1
        elif token in (":", "|"):
            separators.append(index)
        elif (partner := partners.get(token)) and depths[partner]:
            # Brackets that were opened since and never closed are text.
            while True:
                begin, height = opened.pop()
                depths[tokens[begin]] -= 1
                inside = separators[height:]
                del separators[height:]
                if tokens[begin] == partner:
                    break
            if token == "]" and (switch := _as_switch(tokens, begin, inside, index, steps)):
                switches[begin] = switch
    return switches


def _as_switch(
    tokens: Sequence[str], begin: int, separators: Sequence[int], end: int, steps: int
) -> _Switch | None:
    """The switch of the brackets from `begin` to `end`; None for those that are a weight."""
    kinds = {tokens[index] for index in separators}
    branches = [(left + 1, right) for left, right in pairwise([begin, *separators, end])]
    if kinds == {"|"}:
        return _Switch(tuple(branches), None, end + 1)
    if kinds != {":"} or len(branches) > 3:
        return None
    number = _WHEN.fullmatch("".join(tokens[slice(*branches[-1])]))
    if number is None:
        return None
    nothing = [(begin + 1, begin + 1)] if len(branches) == 2 else []
    return _Switch((*nothing, *branches[:-1]), _step(number[1], steps), end + 1)


def _step(when: str, steps: int) -> int:
    """The step that a number means: a number of steps, or with a decimal point a fraction of them."""
    if "." not in when:
        return int(min(float(when), steps))
    # Round first; otherwise 0.29 of 100 steps would be 28.
    return math.floor(round(min(max(float(when), 0.0), 1.0) * steps, 6))


def _text_at(tokens: Sequence[str], switches: dict[int, _Switch], step: int) -> str:
    """The text at a step, with one branch instead of each switch."""
    text: list[str] = []
    # The branches that are being read: their ends, and where to continue from there.
    inside: list[tuple[int, int]] = []
    index = 0
    while index < len(tokens):
        if inside and index == inside[-1][0]:
            index = inside.pop()[1]
        elif switch := switches.get(index):
            index, end = switch.branch(step)
            inside.append((end, switch.after))
        else:
            text.append(tokens[index])
            index += 1
    return "".join(text)
