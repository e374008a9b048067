"""SIGTERM and Ctrl-C between two steps."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from latentgen.train.signals import StopSignal

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@pytest.fixture
def caught() -> Iterator[list[int]]:
    """The signals that reached the handlers installed before."""
    numbers: list[int] = []
    before = {number: signal.signal(number, lambda number, _: numbers.append(number)) for number in SIGNALS}
    yield numbers
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_is_remembered_and_the_second_acts(number: int, caught: list[int]):
    with StopSignal() as stop:
        assert stop.number == 0
        signal.raise_signal(number)
        assert stop.number == number
        assert caught == []
        signal.raise_signal(number)
        assert caught == [number]


def test_handlers_come_back(caught: list[int]):
    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(SystemExit), StopSignal():
        raise SystemExit(143)
    assert [signal.getsignal(number) for number in SIGNALS] == before
    signal.raise_signal(signal.SIGTERM)
    assert caught == [signal.SIGTERM]
