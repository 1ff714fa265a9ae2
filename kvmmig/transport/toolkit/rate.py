"""A limit on how many bytes move in a second."""

from __future__ import annotations

from time import perf_counter

import trio

from kvmmig.units import parse_bandwidth

#: What may be sent at once after a pause, as so many seconds of the bandwidth: far less than the 100 ms
#: within which the rate is to be smooth, and enough that one call is worth its cost.
_BURST = 0.020


class TokenBucket:
    """Bytes that may be sent, refilled at ``rate`` bytes a second; no limit where that is None."""

    def __init__(self, rate: float | None = None) -> None:
        """`ValueError` for what is no rate."""
        self._rate = parse_bandwidth(rate)
        self._tokens = 0.0
        self._filled = perf_counter()

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
        self._filled = perf_counter()

    def allowed(self) -> int | None:
        """How many bytes may be sent now; None is no limit.

        0 until there is something worth sending: a quarter of a burst, or a byte.
        """
        if self._rate is None:
            return None
        now = perf_counter()
        most = max(self._rate * _BURST, 1.0)
        self._tokens = min(self._tokens + (now - self._filled) * self._rate, most)
        self._filled = now
        return int(self._tokens) if self._tokens >= self._worth(self._rate) else 0

    def spend(self, count: int) -> None:
        """So many bytes were sent."""
        if self._rate is not None:
            self._tokens -= count

    async def wait(self) -> None:
        """Wait until there is something worth sending."""
        if self._rate is not None:
            await trio.sleep(max(self._worth(self._rate) - self._tokens, 0.0) / self._rate)

    @staticmethod
    def _worth(rate: float) -> float:
        # Who sent each byte the moment that it may be sent would be busy with nothing but calls.
        return max(rate * _BURST / 4, 1.0)
