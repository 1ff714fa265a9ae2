"""A limit on how many bytes move in a second."""

from __future__ import annotations

import math
from time import perf_counter

import trio

from kvmmig.units import parse_bandwidth

#: Who was kept from sending for so many seconds, by a busy host or a full link, may make up for it at once.
#: What a longer time would have allowed is forgotten, so the rate is smooth within that time.
_CREDIT = 0.100
#: What is waited for when nothing may be sent, as seconds of the bandwidth: one call is to be worth its cost.
_WORTH = 0.005


class TokenBucket:
    """Bytes that may be sent, refilled at ``rate`` bytes a second; no limit where that is None."""

    def __init__(self, rate: float | None = None) -> None:
        """`ValueError` for what is no rate."""
        self.rate = rate

    @property
    def rate(self) -> float | None:
        """The limit in bytes a second. Setting it takes effect at once, also on who is waiting.

        `ValueError` for what is no rate.
        """
        return self._rate

    @rate.setter
    def rate(self, rate: float | None) -> None:
        self._rate = parse_bandwidth(rate)
        self._tokens = 0.0
        self.begin()

    def begin(self) -> None:
        """Sending begins, perhaps after a pause: what was not sent before is no credit."""
        self._tokens = min(self._tokens, 0.0)
        self._filled = perf_counter()
        self._patience = _CREDIT

    def allowed(self) -> int | None:
        """How many bytes may be sent now; None is no limit. 0 until there is something worth sending."""
        if self._rate is None:
            return None
        now = perf_counter()
        gone, self._filled = now - self._filled, now
        most = max(self._rate * _CREDIT, 1.0) if gone <= self._patience else 0.0
        self._tokens = min(self._tokens + gone * self._rate, most)
        # Who sent each byte the moment that it may be sent would be busy with nothing but calls.
        allowed = int(self._tokens) if self._tokens >= self._worth(self._rate) else 0
        self._patience = _CREDIT if allowed else math.inf  # who may send nothing waits, however late it wakes
        return allowed

    def spend(self, count: int) -> None:
        """So many bytes were sent."""
        if self._rate is not None:
            self._tokens -= count

    async def wait(self) -> None:
        """Wait until there is something worth sending: 5 ms of the bandwidth, or a byte."""
        if self._rate is not None:
            await trio.sleep(max(self._worth(self._rate) - self._tokens, 0.0) / self._rate)

    @staticmethod
    def _worth(rate: float) -> float:
        return max(rate * _WORTH, 1.0)
