"""The benchmark of training steps parses progress bars."""

from __future__ import annotations

import os
import sys

import pytest

from benchmarks.training import Measures, Sight, last_count, took, watched

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the benchmark reads /proc")

BAR = """
import sys, time
from tqdm import tqdm
held = bytearray(64 * 2**20)
held[:] = b"1" * len(held)
del held
for _ in tqdm(range(100), desc="Others", file=sys.stdout):
    pass
for _ in tqdm(range(10**6), desc="Steps", mininterval=0):
    time.sleep(0.05)
"""


def test_counts_of_the_named_bar():
    output = "Others: 100%|###| 9/9 [00:00<00:00]\nSteps:  40%|####      | 2/5 [00:02<00:03, lr=1]"
    assert last_count(output, "Steps") == 2
    assert last_count(output + "\rSteps:  60%|######    | 3/5 [00:03<00:02]", "Steps") == 3
    assert last_count(output + "\rSteps:  60%|####", "Steps") == 2
    assert last_count("Others: 100%|###| 9/9 [00:00<00:00]", "Steps") is None


def test_the_first_steps_are_left_out():
    sights = [Sight(0, 10.0, 5.0, 900.0), Sight(1, 30.0, 9.0, 700.0), Sight(2, 33.0, 11.0, 800.0)]
    sights.append(Sight(6, 41.0, 13.0, 850.0))
    assert took(sights, 2) == Measures(start=10.0, step=2.0, busy=0.5, loading=900.0, stepping=850.0)
    assert took(sights, 2).peak == 900.0


def test_a_process_is_watched_until_enough_steps():
    sights = list(watched([sys.executable, "-c", BAR], os.environ, "Steps", 10))
    assert [sight.count for sight in sights] == sorted({sight.count for sight in sights})
    assert sights[0].count == 0
    assert sights[-1].count >= 10
    assert 0.05 <= took(sights, 2).step < 1
    # Memory freed before the first sight counts only as loading.
    assert sights[0].peak - sights[-1].peak > 32


def test_a_failing_process_is_an_error_with_its_output():
    with pytest.raises(RuntimeError, match="no such bar"):
        list(watched([sys.executable, "-c", "raise SystemExit('no such bar')"], os.environ, "Steps", 1))
