"""The dirtier's patterns: what the host reckons is what comes of the turns, one by one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmmig.guests.patterns import PATTERNS, Random, Zipf


@pytest.mark.parametrize("number", PATTERNS)
@given(hot=st.integers(1, 70), steps=st.integers(0, 600))
def test_the_generations_are_those_that_the_turns_make(number: int, hot: int, steps: int) -> None:
    turns = [PATTERNS[number](hot, step).next for step in range(steps)]
    counted = np.bincount([page for page in turns if page is not None], minlength=hot)
    pages = np.arange(hot, dtype=np.uint64)
    assert PATTERNS[number](hot, steps).generations(pages).tolist() == counted.tolist()


@pytest.mark.parametrize("hot", [1, 2, 1000, 1024])
def test_random_is_each_page_once_a_lap_in_an_order_of_its_own(hot: int) -> None:
    lap = 1 << (hot - 1).bit_length()
    first, second = ([Random(hot, step).next for step in range(n * lap, (n + 1) * lap)] for n in range(2))
    assert sorted(page for page in first if page is not None) == list(range(hot))
    assert sorted(page for page in second if page is not None) == list(range(hot))
    assert hot < 3 or first != second


def test_zipf_rewrites_each_page_about_as_often_as_its_rank_wants() -> None:
    counts = Zipf(1000, 10 * 100_000).generations(np.arange(1000, dtype=np.uint64))
    shares = counts / counts[0] * np.arange(1, 1001)
    assert shares.min() >= 0.5
    assert shares.max() <= 2
