"""Sending in bounded steps, no faster than allowed."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from time import perf_counter

import trio

from kvmmig.errors import MigrationError
from kvmmig.image import PieceCursor
from kvmmig.migration.policy import Limits
from kvmmig.migration.record import Record
from kvmmig.stream import Cursor
from kvmmig.transport.guard import GuardedChannel
from kvmmig.transport.toolkit.rate import TokenBucket

#: Seconds of a step that are kept for its last call, which is not cut short: a copy of some hundred KiB, and
#: the time slice that a busy thread may lose meanwhile to another one (a tick of the kernel's, 4 ms, or two).
_LAST_CALL = 0.005


async def _nothing() -> bool:
    return False


def because(channel: GuardedChannel | None) -> str:
    """What a channel waits for, to be put behind a sentence; empty where that is not known."""
    reason = channel.waits_for() if channel is not None else ""
    return f": {reason}" if reason else ""


class Sender:
    """Sends the cursor in bounded steps: ``await send(more)``."""

    def __init__(
        self,
        channel: GuardedChannel,
        cursor: Cursor | PieceCursor,
        record: Record,
        limits: Limits,
        bucket: TokenBucket,
    ) -> None:
        self._channel = channel
        self._cursor = cursor
        self._record = record
        self._limits = limits
        self._bucket = bucket
        self._most = channel.call_size
        channel.send_bound = limits.step

    async def __call__(
        self, more: Callable[[], Awaitable[bool]] = _nothing, *, enough: Callable[[], bool] = lambda: False
    ) -> bool:
        """Send until the cursor is empty and ``await more()`` puts nothing in any more, and return True.

        ``enough`` is asked between steps; where it says so, return False with the rest unsent. Raises
        `MigrationError` when not one byte was accepted for `Limits.stall_timeout`.
        """
        moved_at = perf_counter()
        watch, done = self._record.watch, False
        if watch is not None:
            watch.begins()
        self._bucket.begin()
        while not done:
            if enough():
                return False
            begin, before = perf_counter(), self._cursor.accepted
            with trio.move_on_after(max(self._limits.step - _LAST_CALL, self._limits.step / 2)):
                done = await self._step(more)
            now = perf_counter()
            self._record.steps.add(now - begin)
            self._record.mark()
            if watch is not None:
                watch.step(begin, now, self._cursor.accepted - before)
            if self._cursor.accepted != before or self._bucket.allowed() == 0:
                moved_at = now
            elif now - moved_at > self._limits.stall_timeout:
                raise MigrationError(
                    f"{self._channel.peer} accepted nothing for {self._limits.stall_timeout:g} s"
                    f"{because(self._channel)}"
                )
        return True

    async def _step(self, more: Callable[[], Awaitable[bool]]) -> bool:
        waits, watch = self._record.waits, self._record.watch
        while True:
            if watch is not None:
                watch.waits("cpu")
            if self._cursor.empty:
                with waits.on("pages"):
                    if not await more():
                        return True
            allowed = self._bucket.allowed()
            if allowed == 0:
                if watch is not None:
                    watch.waits("limit")
                with waits.on("limit"):
                    await self._bucket.wait()
                continue
            if watch is not None:
                watch.sends()
            with waits.on("channel"):
                count = await self._offer(min(allowed or self._most, self._most))
            self._cursor.advance(count)
            if watch is not None:
                watch.sent(count)
            self._bucket.spend(count)

    async def _offer(self, most: int) -> int:
        if isinstance(self._cursor, PieceCursor):
            return await self._channel.write_some(self._cursor.head(most))
        return await self._channel.send_some(self._cursor.head(most))
