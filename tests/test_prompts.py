"""What a prompt may hold, and chunks of tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentgen.errors import ConfigError, InputError
from latentgen.prompts import check_prompts, chunk_tokens, expand_tokens, token_expansions

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
    with pytest.raises(ConfigError, match="window of 2 tokens"):
        chunk([[5]], 2)


@pytest.mark.parametrize("prompt", ["", "tiger", "🐯 日本 \u200d\u0301", "tab\tnewline\n\x1b[31m"])
def test_any_unicode_text_is_a_prompt(prompt):
    check_prompts([prompt])


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (["tiger", "a\0b"], "prompt 1: NUL at position 1"),
        (["a\udc00"], "prompt 0: half of a surrogate pair at position 1"),
        (["tiger", None], "prompt 1: expected a string, found NoneType"),
        ([], "non-empty sequence"),
        ("tiger", "non-empty sequence"),
    ],
)
def test_what_is_not_text_is_refused(prompts, message):
    with pytest.raises(InputError, match=message):
        check_prompts(prompts)


def test_numbered_tokens_belong_together():
    added = {"<cat>": 10, "<cat>_1": 11, "<cat>_2": 12, "<cat>_4": 14, "<dog>": 20, "<cow>_1": 30}
    expansions = token_expansions(added)
    assert expansions == {10: (10, 11, 12)}
    assert expand_tokens([[1, 10, 20], [11, 14], []], expansions) == [[1, 10, 11, 12, 20], [11, 14], []]


@given(st.lists(st.lists(st.integers(0, 1000), max_size=9), max_size=4))
def test_without_numbered_tokens_rows_stay(rows):
    assert expand_tokens(rows, token_expansions({"<cat>": 1, "<dog>": 2})) == rows
