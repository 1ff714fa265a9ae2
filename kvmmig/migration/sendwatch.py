"""Watches how the sending of a migration goes on: its steps, its sends, and what holds it up."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import TypeAlias

from kvmmig.migration.events import HeldBy, RecordedEvent, Sent, Stalled, StepTaken

#: What an event is told to: quick, and raises nothing.
Tell: TypeAlias = Callable[[RecordedEvent], None]
#: Seconds without a byte that are a stall.
_STALL = 0.010


class SendWatch:
    """Watches one sender: its steps, its sends, and what it waits for meanwhile."""

    def __init__(self, tell: Tell, channel: HeldBy, waits_for: Callable[[], str]) -> None:
        """``channel`` is what the far end is, ``waits_for`` what it says of itself."""
        self._tell = tell
        self._channel = channel
        self._waits_for = waits_for
        self._cause: HeldBy = "cpu"
        self._since = self._moved = perf_counter()
        self._spent: dict[HeldBy, float] = {}  # since a byte was accepted
        self._in_all: dict[HeldBy, float] = {}
        self._words = ""

    def begins(self) -> None:
        """From here on time counts."""
        self._since = self._moved = perf_counter()
        self._spent.clear()
        self._cause, self._words = "cpu", ""

    def waits(self, cause: HeldBy) -> None:
        """What comes next is spent on this."""
        now = perf_counter()
        self._spend(now)
        self._cause, self._since = cause, now

    def sends(self) -> None:
        """What comes next is up to the channel."""
        self.waits(self._channel)

    def sent(self, count: int) -> None:
        """The channel accepted so many bytes."""
        now = perf_counter()
        self._tell(Sent(at=self._since, duration=now - self._since, sent_bytes=count))
        self._spend(now)
        if now - self._moved >= _STALL:
            held_by = max(self._spent, key=lambda cause: self._spent[cause])
            words = self._words if held_by == self._channel else ""
            self._tell(Stalled(at=self._moved, duration=now - self._moved, held_by=held_by, words=words))
        self._spent.clear()
        self._moved = self._since = now
        self._cause, self._words = "cpu", ""

    def step(self, began: float, ended: float, count: int) -> None:
        """A step has come to its end; ``count`` bytes were accepted in it."""
        self._tell(StepTaken(at=began, duration=ended - began, sent_bytes=count))
        if not count and self._cause == self._channel:
            self._words = self._waits_for()

    def take_spent(self) -> dict[HeldBy, float]:
        """The seconds that were spent on each thing since the last call of this."""
        spent, self._in_all = self._in_all, {}
        return spent

    def _spend(self, now: float) -> None:
        seconds = now - self._since
        self._spent[self._cause] = self._spent.get(self._cause, 0.0) + seconds
        self._in_all[self._cause] = self._in_all.get(self._cause, 0.0) + seconds
