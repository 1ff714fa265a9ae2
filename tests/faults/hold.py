"""Holding a migration at one call of its channel, so that a fault strikes exactly there.

A hello to a file, or the flush at its end, is over within a millisecond; held, it lasts until the fault has
struck. The channel behind is the real one, and when it is let go the call goes on as it would have.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import trio

from kvmmig.transport import AnyChannel, PassingChannel, Side, Transport, Wrapper
from tests.faults.matrix import Moment


class Hold:
    """Where to hold: `Moment.HELLO` is before the first send, `Moment.COMMIT` before the first flush, and
    `Moment.HANDED_OVER` before what is sent after it, which is "go"."""

    def __init__(self, moment: Moment) -> None:
        self.moment = moment
        self.reached = trio.Event()
        self.released = trio.Event()

    async def wait(self, moment: Moment) -> None:
        """Called at each such call; returns at once after the release."""
        if moment is self.moment:
            self.reached.set()
            await self.released.wait()


class HoldingWrapper(Wrapper):
    """Holds its channel at one moment, if any. ``settle`` is awaited after the connect."""

    def __init__(self, inner: Transport, hold: Hold | None, settle: Callable[[], Awaitable[None]]) -> None:
        super().__init__(replace(inner.uri, wrappers=("hold", *inner.uri.wrappers)), inner)
        self._hold = hold
        self._settle = settle

    @asynccontextmanager
    async def wrap(self, channel: AnyChannel, *, side: Side) -> AsyncIterator[AnyChannel]:
        await self._settle()
        yield HoldingChannel(channel, self._hold) if self._hold else channel


class HoldingChannel(PassingChannel):
    """The channel behind, held at one moment."""

    def __init__(self, channel: AnyChannel, hold: Hold) -> None:
        super().__init__(channel)
        self._hold = hold
        self._flushed = False

    async def send_some(self, buffers: Sequence[memoryview]) -> int:
        await self._hold.wait(Moment.HANDED_OVER if self._flushed else Moment.HELLO)
        return await super().send_some(buffers)

    async def flush(self) -> None:
        await self._hold.wait(Moment.COMMIT)
        await super().flush()
        self._flushed = True
