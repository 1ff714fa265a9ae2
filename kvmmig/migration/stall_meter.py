"""How long did the event loop not poll? The stall meter, and the histogram that keeps its answers.

A *turn* is what the loop does between two polls for I/O: while it lasts, no monitor answers and no cancel
takes effect. The meter is an instrument of trio's, cheap enough to be left on: a microsecond or two a turn.
It sees what tasks do, and not how long the loop's thread waits for the GIL or for a CPU before it may begin.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from time import perf_counter

import trio

_STEPS = 8  # buckets for each doubling: a quantile is right to within 9 %


@dataclass(frozen=True, slots=True, kw_only=True)
class Durations:
    """A histogram's answers at one moment. Seconds."""

    count: int
    worst: float
    p99: float
    p999: float
    #: ``(upper bound, how many)``, ascending; each bucket is 9 % wide.
    buckets: tuple[tuple[float, int], ...]


class Histogram:
    """Durations in seconds, in logarithmic buckets: bounded memory, however many there are."""

    def __init__(self) -> None:
        self.count = 0
        self.worst = 0.0
        self._buckets: Counter[int] = Counter()

    def add(self, seconds: float) -> None:
        """Count one duration."""
        self.count += 1
        self.worst = max(self.worst, seconds)
        self._buckets[math.ceil(math.log2(max(seconds, 1e-9)) * _STEPS)] += 1

    def quantile(self, q: float) -> float:
        """The duration that a share ``q`` (0 to 1) of all of them did not exceed; 0 when there are none."""
        return self._quantile(q, self._ascending())

    def snapshot(self) -> Durations:
        """All that it knows, frozen. Some tens of microseconds: a monitor may ask every millisecond."""
        buckets = self._ascending()
        return Durations(
            count=self.count,
            worst=self.worst,
            p99=self._quantile(0.99, buckets),
            p999=self._quantile(0.999, buckets),
            buckets=buckets,
        )

    def _ascending(self) -> tuple[tuple[float, int], ...]:
        return tuple((_upper(bucket), count) for bucket, count in sorted(self._buckets.items()))

    def _quantile(self, q: float, buckets: tuple[tuple[float, int], ...]) -> float:
        above = self.count - math.ceil(q * self.count)  # so many may lie above it: few, so begin at that end
        for upper, count in reversed(buckets):
            above -= count
            if above < 0:
                return min(upper, self.worst)
        return self.worst


@cache
def _upper(bucket: int) -> float:
    return float(2.0 ** (bucket / _STEPS))


def stolen() -> float:
    """Seconds since its boot for which this host, itself a virtual machine, was kept from its CPUs.

    The sum over all of them, as proc(5) calls "steal"; 0 on real hardware. Nothing in this process can run
    meanwhile, and no bound holds.
    """
    try:
        with open("/proc/stat", encoding="ascii") as stat:
            return int(stat.readline().split()[8]) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError, ValueError):
        return 0.0


class StallMeter(trio.abc.Instrument):
    """Measures the turns of the loop that it is entered on: ``with StallMeter() as meter: ...``."""

    def __init__(self, on_turn: Callable[[float, float, str], None] | None = None) -> None:
        """``on_turn`` is told each turn: its begin, its end, the task that ran longest. Be quick."""
        self.turns = Histogram()
        self._on_turn = on_turn
        #: The name of the task that ran longest in the worst turn.
        self.culprit = ""
        self._woke = 0.0
        self._resumed = 0.0
        self._longest = 0.0
        self._name = ""

    def __enter__(self) -> StallMeter:
        self._woke = self._resumed = perf_counter()
        trio.lowlevel.add_instrument(self)
        return self

    def __exit__(self, *_: object) -> None:
        trio.lowlevel.remove_instrument(self)

    def after_io_wait(self, timeout: float) -> None:
        self._woke = perf_counter()
        self._longest = 0.0

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self._resumed = perf_counter()

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        took = perf_counter() - self._resumed
        if took > self._longest:
            self._longest = took
            self._name = task.name

    def before_io_wait(self, timeout: float) -> None:
        now = perf_counter()
        turn = now - self._woke
        if self._on_turn is not None:
            self._on_turn(self._woke, now, self._name)
        if turn > self.turns.worst:
            self.culprit = self._name
        self.turns.add(turn)
