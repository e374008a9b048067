"""Prompts: their syntax, read in linear time, and chunks of tokens.

Expected weights and texts are those of A1111's web UI (modules/prompt_parser.py), where nothing else is said.
"""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentgen.errors import ConfigError, InputError
from latentgen.prompt_switches import MAX_SWITCHED_CHARACTERS, resolve_switches
from latentgen.prompts import (
    Piece,
    PromptSchedule,
    PromptSyntax,
    WeightedPrompt,
    check_prompts,
    chunk_tokens,
    expand_tokens,
    plain_prompt,
    read_prompt,
    read_weights,
    token_expansions,
)

MEGABYTE = 1_000_000


def weights(text: str, *, bare: bool) -> list[tuple[str, float]]:
    (part,) = read_weights(text, bare=bare).parts
    return [(piece.text, pytest.approx(piece.weight)) for piece in part]  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", [("", 1.0)]),
        ("a cat", [("a cat", 1.0)]),
        ("a (red) cat", [("a ", 1.0), ("red", 1.1), (" cat", 1.0)]),
        ("a [red] cat", [("a ", 1.0), ("red", 1 / 1.1), (" cat", 1.0)]),
        ("a (red:1.4)cat", [("a ", 1.0), ("red", 1.4), ("cat", 1.0)]),
        ("(red: -.5 )", [("red", -0.5)]),
        ("(red:+2.)", [("red", 2.0)]),
        ("(red:0)", [("red", 0.0)]),
        ("((red))", [("red", 1.21)]),
        ("(a (red:2) [cat]:1.5)", [("a ", 1.5), ("red", 3.0), (" ", 1.5), ("cat", 1.5 / 1.1)]),
        ("(a)(b)", [("ab", 1.1)]),
        (r"\(a\) \[b\] \\", [(r"(a) [b] " + "\\", 1.0)]),
        (r"(a\):2)", [("a)", 2.0)]),
        ("(never closed", [("never closed", 1.1)]),
        ("[never closed", [("never closed", 1 / 1.1)]),
        ("never opened)]", [("never opened)]", 1.0)]),
        ("never opened:1.2)", [("never opened:1.2)", 1.0)]),
        ("(a [b) c]", [("a ", 1.1), ("b", 1.0), (" c", 1 / 1.1)]),
        ("(a:b)", [("a:b", 1.1)]),
        ("(a:1.2.3)", [("a:1.2.3", 1.1)]),
        ("(a:1e3)", [("a:1e3", 1.1)]),
        ("(a::2)", [("a:", 2.0)]),
        ("(:2)", [("", 1.0)]),
        # There a lone backslash is lost, although its documentation says that it is text.
        ("a\\b \\", [("a\\b \\", 1.0)]),
    ],
)
def test_a1111_reads_all_signs(text: str, expected: list[tuple[str, float]]):
    assert weights(text, bare=True) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a (red:1.4) cat", [("a ", 1.0), ("red", 1.4), (" cat", 1.0)]),
        ("(a (red:2) cat:1.5)", [("a ", 1.5), ("red", 3.0), (" cat", 1.5)]),
        ("(a (small) [red] cat:1.5)", [("a (small) [red] cat", 1.5)]),
        ("((red)) [cat] (never closed", [("((red)) [cat] (never closed", 1.0)]),
        (":( a (red:2) :)", [(":( a ", 1.0), ("red", 2.0), (" :)", 1.0)]),
        (r"\(16:9\), (a:2)", [("(16:9), ", 1.0), ("a", 2.0)]),
        (r"a\b \[c\] \\", [(r"a\b \[c\] \\", 1.0)]),
        ("BREAK [a:b:0.5] [a|b]", [("BREAK [a:b:0.5] [a|b]", 1.0)]),
    ],
)
def test_by_default_only_a_stated_weight_is_one(text: str, expected: list[tuple[str, float]]):
    assert weights(text, bare=False) == expected


@given(st.text(st.sampled_from("ab ()[]:|,.BREAK\n")))
def test_by_default_a_prompt_without_numbers_and_escapes_is_what_it_was(text: str):
    assert read_weights(text) == plain_prompt(text)


@given(st.text())
def test_a_plain_prompt_has_no_markup(text: str):
    assert read_prompt(text, "plain", 10) == PromptSchedule(((0, plain_prompt(text)),))


TEXTS = st.text(st.sampled_from("ab ()[]:|\\.1,é\n"), min_size=1, max_size=8)
WEIGHTS = st.integers(-400, 400).map(lambda number: number / 100)


@given(st.lists(st.tuples(TEXTS, WEIGHTS), min_size=1, max_size=6))
def test_what_is_written_out_is_read_back(pieces: list[tuple[str, float]]):
    def escaped(text: str) -> str:
        return "".join(f"\\{sign}" if sign in "()[]\\" else sign for sign in text)

    written = "".join(f"({escaped(text)}:{weight})" for text, weight in pieces)
    (part,) = read_weights(written, bare=True).parts
    assert [(sign, piece.weight) for piece in part for sign in piece.text] == [
        (sign, weight) for text, weight in pieces for sign in text
    ]
    assert all(left.weight != right.weight for left, right in pairwise(part))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a BREAK b", [["a "], [" b"]]),
        ("a,BREAK,b", [["a,"], [",b"]]),
        ("BREAK a", [[""], [" a"]]),
        ("a BREAK", [["a "]]),
        ("a BREAK \n", [["a "]]),
        ("a BREAK BREAK b", [["a "], [" "], [" b"]]),
        ("BREAK", [[""]]),
        ("BREAKFAST aBREAK break", [["BREAKFAST aBREAK break"]]),
        ("(a BREAK b:1.2) c", [["a "], [" b", " c"]]),
    ],
)
def test_break_begins_a_part(text: str, parts: list[list[str]]):
    read = read_weights(text, bare=True)
    assert [[piece.text for piece in part] for part in read.parts] == parts


def test_a_weight_continues_after_a_break():
    expected = WeightedPrompt(((Piece("a ", 1.2),), (Piece(" b", 1.2), Piece(" c", 1.0))))
    assert read_weights("(a BREAK b:1.2) c", bare=True) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a cat", [(0, "a cat")]),
        ("a [b:c:3] d", [(0, "a b d"), (3, "a c d")]),
        ("a [b:c:0.25] d", [(0, "a b d"), (2, "a c d")]),
        ("a [b:.5]", [(0, "a "), (5, "a b")]),
        ("a [b::.5]", [(0, "a b"), (5, "a ")]),
        ("a [:b: 3 ]", [(0, "a "), (3, "a b")]),
        ("[b:c:0]", [(0, "c")]),
        ("[b:c:-1]", [(0, "c")]),
        ("[b:c:10]", [(0, "b")]),
        ("[b:c:1.0]", [(0, "b")]),
        ("[b:c:1]", [(0, "b"), (1, "c")]),
        ("[b:c:99999999999999999999]", [(0, "b")]),
        ("a[b:[c:d:2]:1]e", [(0, "abe"), (1, "ace"), (2, "ade")]),
        ("[[a:b:3]:c:5]", [(0, "a"), (3, "b"), (5, "c")]),
        ("[(a:1.2):(b:1.3):5]", [(0, "(a:1.2)"), (5, "(b:1.3)")]),
        ("([a:b:5]:1.2)", [(0, "(a:1.2)"), (5, "(b:1.2)")]),
        ("a [[[b]]:2]", [(0, "a "), (2, "a [[b]]")]),
        ("[a:2] [b:7]", [(0, " "), (2, "a "), (7, "a b")]),
        ("[a:a:2]", [(0, "a")]),
        # None of these is a switch.
        ("a [b]", [(0, "a [b]")]),
        ("[a:b:c:3]", [(0, "[a:b:c:3]")]),
        ("[a:b]", [(0, "[a:b]")]),
        ("[a:b:3", [(0, "[a:b:3")]),
        (r"\[a:b:3\]", [(0, r"\[a:b:3\]")]),
        (r"[a\:b:3]", [(0, ""), (3, r"a\:b")]),
        ("(a:3)", [(0, "(a:3)")]),
        ("((a][:b:c [d:3]", [(0, "((a][:b:c "), (3, "((a][:b:c d")]),
    ],
)
def test_switches_over_ten_steps(text: str, expected: list[tuple[int, str]]):
    assert resolve_switches(text, 10) == expected


def test_a_share_of_the_steps_is_counted_exactly():
    assert [resolve_switches(f"[a:0.{share:02}]", 100)[-1][0] for share in range(1, 100)] == list(
        range(1, 100)
    )


def test_texts_take_turns():
    assert resolve_switches("[a|b|]c", 5) == [(0, "ac"), (1, "bc"), (2, "c"), (3, "ac"), (4, "bc")]


def test_the_prompt_of_a_step():
    schedule = read_prompt("[(a:2):b:3]", "a1111", 10)
    assert [schedule.at(step).text for step in range(5)] == ["a", "a", "a", "b", "b"]
    assert schedule.at(0) == WeightedPrompt(((Piece("a", 2.0),),))


TOKENS = st.sampled_from(["a", " ", "(", ")", "[", "]", ":", "|", ":1.2)", ":0.5]", ":3]", "\\", "BREAK"])


@given(st.lists(TOKENS, max_size=30).map("".join), st.integers(1, 20))
def test_any_signs_give_prompts_for_all_steps(text: str, steps: int):
    schedule = read_prompt(text, "a1111", steps)
    beginnings = [step for step, _ in schedule.changes]
    assert beginnings[0] == 0
    assert beginnings == sorted(set(beginnings))
    assert beginnings[-1] < steps
    assert all(part for _, prompt in schedule.changes for part in prompt.parts)


def repeated(unit: str) -> str:
    return unit * (MEGABYTE // len(unit))


def nested(begin: str, end: str) -> str:
    count = MEGABYTE // len(begin + end)
    return begin * count + "a" + end * count


@pytest.mark.parametrize(
    ("text", "syntax"),
    [
        (repeated("("), "explicit"),
        (repeated("(a:1.0)"), "explicit"),
        (repeated("["), "a1111"),
        (repeated("[(]"), "a1111"),
        (repeated(":1"), "a1111"),
        (":" + repeated(" "), "a1111"),
        ("(a:" + repeated("1"), "a1111"),
        (repeated("[a:b:.5]"), "a1111"),
        (repeated("BREAK "), "a1111"),
        (nested("(", ":1.0)"), "a1111"),
        (nested("[", ":b:3]"), "a1111"),
    ],
    ids=lambda text: f"{text[:9]}..{text[-5:]}",
)
def test_a_megabyte_is_read_in_linear_time(text: str, syntax: PromptSyntax):
    # One to two seconds on slow processors; quadratic time would be minutes. Of this process alone, on a busy machine.
    begin = time.process_time()
    read_prompt(text, syntax, 50)
    assert time.process_time() - begin < 5.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("(" * 100 + "a cat", "weight 13780.6"),
        ("(" * MEGABYTE + "a cat", "weight inf"),
        ("(a cat:-1001)", "weight -1001"),
        ("((a cat:0):" + "9" * 400 + ")", "weight nan"),
    ],
)
def test_weights_out_of_bounds_are_refused(text: str, message: str):
    with pytest.raises(InputError, match=message):
        read_prompt(text, "a1111", 10)


def test_a_long_prompt_may_not_switch_often():
    switch = "[a|b]"
    read_prompt(switch + "c" * (MAX_SWITCHED_CHARACTERS // 100 - len(switch)), "a1111", 100)
    with pytest.raises(InputError, match="99 of 100 steps"):
        read_prompt(switch + "c" * (MAX_SWITCHED_CHARACTERS // 100), "a1111", 100)


def test_an_unknown_syntax_is_refused():
    with pytest.raises(InputError, match="prompt_syntax='compel'"):
        read_prompt("a", "compel", 10)  # type: ignore[arg-type]


BOS, EOS, PAD = 1001, 1002, 1003


def chunk(rows: list[list[int]], window: int) -> list[list[list[int]]]:
    return chunk_tokens([[row] for row in rows], window, bos=BOS, eos=EOS, pad=PAD)


@given(st.lists(st.lists(st.integers(0, 1000), max_size=40), min_size=1, max_size=4), st.integers(3, 12))
def test_chunks_keep_every_token_in_order(rows, window):
    chunked = chunk(rows, window)
    assert len({len(chunks) for chunks in chunked}) == 1
    for row, chunks in zip(rows, chunked, strict=True):
        assert [token for part in chunks for token in part if token not in (BOS, EOS, PAD)] == row
        for part in chunks:
            assert len(part) == window
            assert part[0] == BOS
            assert part.count(BOS) == part.count(EOS) == 1
            assert set(part[part.index(EOS) + 1 :]) <= {PAD}


def test_short_rows_take_one_chunk_and_long_rows_fill_theirs():
    assert chunk([[5, 6, 7], []], 5) == [[[BOS, 5, 6, 7, EOS]], [[BOS, EOS, PAD, PAD, PAD]]]
    assert chunk([[5, 6, 7, 8], [9]], 5) == [
        [[BOS, 5, 6, 7, EOS], [BOS, 8, EOS, PAD, PAD]],
        [[BOS, 9, EOS, PAD, PAD], [BOS, EOS, PAD, PAD, PAD]],
    ]


def test_a_window_without_room_for_text_is_refused():
    with pytest.raises(ConfigError, match="window"):
        chunk([[5]], 2)


def test_any_unicode_text_is_a_prompt():
    check_prompts(["", "tiger", "🐯 日本 \u200d\u0301", "tab\tnewline\n\x1b[31m"])


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (["tiger", "a\0b"], "prompt 1.*NUL.* 1"),
        (["a\udc00"], "prompt 0.*surrogate.* 1"),
        (["tiger", None], "prompt 1.*NoneType"),
        ([], "prompts"),
        ("tiger", "prompts"),
    ],
)
def test_other_prompts_are_refused(prompts, message):
    with pytest.raises(InputError, match=message):
        check_prompts(prompts)


def test_numbered_tokens_belong_together():
    added = {"<cat>": 10, "<cat>_1": 11, "<cat>_2": 12, "<cat>_4": 14, "<dog>": 20, "<cow>_1": 30}
    expansions = token_expansions(added)
    assert expansions == {10: (10, 11, 12)}
    assert expand_tokens([[1, 10, 20], [11, 14], []], expansions) == [[1, 10, 11, 12, 20], [11, 14], []]
