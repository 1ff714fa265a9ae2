"""Where a migration's time went: what sending waited for, and what the guest stood still for."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Literal, TypeAlias

Held: TypeAlias = Literal["link", "disk", "CPU", "limit", "guest"]

_WINDOW = 1.0  # seconds that a live rate is of
_SPACING = 0.05  # seconds between two of its marks


def run_delay(threads: Sequence[int]) -> float:
    """Seconds since their begin for which these threads of this process could have run, and had no CPU.

    The kernel's own account, the sum over all of them: ``/proc/PID/task/TID/schedstat``, see
    Documentation/scheduler/sched-stats.rst. 0 where the kernel keeps none.
    """
    total = 0
    for thread in threads:
        try:
            with open(f"/proc/self/task/{thread}/schedstat", encoding="ascii") as account:
                total += int(account.read().split()[1])
        except (OSError, IndexError, ValueError):
            continue
    return total / 1e9


@dataclass(slots=True)
class Waits:
    """Seconds that the sending side has waited, by what it waited for."""

    #: For the channel to take bytes.
    channel: float = 0.0
    #: For a limit on the bandwidth.
    limit: float = 0.0
    #: For the next pages to be looked at, copied, digested.
    pages: float = 0.0

    @contextmanager
    def on(self, what: Literal["channel", "limit", "pages"]) -> Iterator[None]:
        """The block waits for this."""
        begin = perf_counter()
        try:
            yield
        finally:
            setattr(self, what, getattr(self, what) + perf_counter() - begin)


def held_back(
    waits: Waits, *, first: float, later: float, delayed: float, elapsed: float, stores: bool
) -> Held:
    """One word for what made a migration take as long as it did.

    ``first`` and ``later`` are the bytes that were sent the first time, and those that were sent since
    because the guest had written meanwhile; ``delayed`` the seconds for which the loop had no CPU.
    """
    if later > first:
        return "guest"
    if waits.limit > waits.channel + waits.pages:
        return "limit"
    if delayed > elapsed / 4 or waits.pages > waits.channel:
        return "CPU"
    return "disk" if stores else "link"


class LiveRate:
    """Bytes a second within the last second, for whoever asks at any moment."""

    def __init__(self) -> None:
        self._marks: deque[tuple[float, int]] = deque()

    def begin(self, count: int) -> None:
        """Sending begins, at so many bytes; what was before does not count."""
        self._marks.clear()
        self._marks.append((perf_counter(), count))

    def mark(self, count: int) -> None:
        """So many bytes have been sent in all."""
        now = perf_counter()
        if self._marks and now - self._marks[-1][0] >= _SPACING:
            self._marks.append((now, count))
            while len(self._marks) > 2 and self._marks[1][0] <= now - _WINDOW:
                self._marks.popleft()

    def rate(self, count: int) -> float | None:
        """As of now, at so many bytes; None where it is too early to say."""
        if not self._marks:
            return None
        at, before = self._marks[0]
        took = perf_counter() - at
        return (count - before) / took if took >= _SPACING else None


class Laps:
    """What a span of time was made of: each lap is what passed since the one before."""

    def __init__(self) -> None:
        self._began = self._last = perf_counter()
        #: Seconds, by name, in the order of their first laps.
        self.parts: dict[str, float] = {}

    def lap(self, name: str) -> float:
        """What has passed since the last lap, or the begin, was this. Returns the seconds since the begin."""
        now = perf_counter()
        self.parts[name] = self.parts.get(name, 0.0) + now - self._last
        self._last = now
        return now - self._began
