"""The stall meter and its histogram."""

from __future__ import annotations

import math
import time

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from kvmmig.migration.stall_meter import Histogram, StallMeter


@given(st.lists(st.floats(1e-7, 100.0), min_size=1), st.floats(0.01, 1.0))
def test_a_quantile_is_right_to_within_a_bucket(values: list[float], q: float) -> None:
    histogram = Histogram()
    for value in values:
        histogram.add(value)
    exact = sorted(values)[math.ceil(q * len(values)) - 1]
    assert exact <= histogram.quantile(q) * 1.0001
    assert histogram.quantile(q) <= exact * 2 ** (1 / 8) * 1.0001
    assert histogram.worst == max(values)
    assert histogram.count == len(values)


def test_an_empty_histogram_has_no_worst_and_no_quantile() -> None:
    assert (Histogram().worst, Histogram().quantile(0.99)) == (0.0, 0.0)


async def test_a_task_that_holds_the_loop_is_seen() -> None:
    with StallMeter() as meter:
        await trio.lowlevel.checkpoint()
        time.sleep(0.05)  # noqa: ASYNC251  # the very thing to be measured
        await trio.lowlevel.checkpoint()
    assert meter.turns.worst == pytest.approx(0.05, abs=0.04)
    assert meter.turns.worst >= 0.05


async def test_waiting_is_no_stall() -> None:
    with StallMeter() as meter:
        await trio.sleep(0.2)
    assert meter.turns.worst < 0.2
    assert meter.turns.count >= 1
