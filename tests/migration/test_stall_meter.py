"""The stall meter and its histogram."""

from __future__ import annotations

import math

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from kvmmig.migration import stall_meter
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


class Clock:
    """The meter's: time passes when a test says so, and beside it in each of the loop's waits for I/O."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Waits(trio.abc.Instrument):
    def __init__(self, clock: Clock, seconds: float) -> None:
        self._clock = clock
        self._seconds = seconds

    def before_io_wait(self, timeout: float) -> None:
        self._clock.now += self._seconds  # told after the meter, which was there before


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(stall_meter, "perf_counter", made)
    return made


async def test_a_task_that_holds_the_loop_is_seen(clock: Clock) -> None:
    async def hold() -> None:
        clock.now += 0.05

    with StallMeter() as meter:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(hold)
        await trio.lowlevel.checkpoint()
    assert meter.turns.worst == pytest.approx(0.05)
    assert meter.culprit.endswith("hold")


async def test_waiting_is_no_stall(clock: Clock) -> None:
    with StallMeter() as meter:
        waits = Waits(clock, 0.2)
        trio.lowlevel.add_instrument(waits)
        for _ in range(3):
            await trio.lowlevel.checkpoint()
        trio.lowlevel.remove_instrument(waits)
    assert clock.now >= 0.6
    assert (meter.turns.worst, meter.turns.count) == (0.0, 3)
