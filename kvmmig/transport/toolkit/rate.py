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
        """How many bytes may be sent now; None is no limit."""
        if self._rate is None:
            return None
        now = perf_counter()
        gone, self._filled = now - self._filled, now
        # Where nobody has wanted to send, that is no credit either.
        most = max(self._rate * _CREDIT, 1.0) if gone <= self._patience else 0.0
        self._patience = _CREDIT
        self._tokens = min(self._tokens + gone * self._rate, most)
        return max(int(self._tokens), 0)  # below 0 when the rate was set while bytes were on their way

    def spend(self, count: int) -> None:
        """So many bytes were sent."""
        if self._rate is not None:
            self._tokens -= count

    async def wait(self) -> None:
        """Wait until there is something worth sending: 5 ms of the bandwidth, or a byte."""
        if self._rate is not None:
            worth = max(self._rate * _WORTH, 1.0)
            self._patience = math.inf
            await trio.sleep(max(worth - self._tokens, 0.0) / self._rate)
