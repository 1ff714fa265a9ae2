"""A library's connection that is worked by tasks of its channel's own: their life, its end, its errors."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import trio

from kvmmig.errors import ChannelBroken, ChannelClosed, TransportError
from kvmmig.transport.toolkit.tasks import own_tasks
from kvmmig.transport.toolkit.words import why

Call = Callable[[], Awaitable[object]]


class Line:
    """What both directions of a channel share.

    ``close`` ends the library's connection in order. ``abort`` ends it at once; without it ``close`` is
    called in a cancelled scope.
    """

    def __init__(self, peer: str, close: Call | None, abort: Callable[[], object] | None) -> None:
        self.peer = peer
        self.changed = trio.lowlevel.ParkingLot()
        self.scope = trio.CancelScope()  # around the pumps alone, not the block
        self.receiving = trio.CancelScope()  # around the pump that receives: it ends before the others
        self.closed = False
        self.close = close
        self._abort = abort
        self._aborted = False

    def check(self, failure: BaseException | None) -> None:
        """Raise `ChannelClosed` after `end`, and `ChannelBroken` where there is a ``failure``."""
        if self.closed:
            raise ChannelClosed(f"the connection to {self.peer} was closed by this side")
        if isinstance(failure, TransportError):
            raise type(failure)(str(failure)) from failure
        if failure is not None:
            raise ChannelBroken(f"the connection to {self.peer} is broken: {words(failure)}") from failure

    def end(self) -> None:
        """No more calls on this channel, and no more of the pumps."""
        self.closed = True
        self.scope.cancel()
        self.changed.unpark_all()

    def abort(self) -> None:
        if not self.closed:
            self._aborted = True
            self.end()
            if self._abort is not None:
                self._abort()

    async def cut(self) -> None:
        """After an abort: what takes a task."""
        if self._aborted and self._abort is None and self.close is not None:
            with trio.CancelScope() as scope:
                scope.cancel()
                await self.close()


@asynccontextmanager
async def running(line: Line, *pumps: Callable[[], Awaitable[None]]) -> AsyncIterator[None]:
    """The ``pumps`` run, in tasks of their own, until the line ends. The end of the block aborts it."""

    async def run() -> None:
        try:
            with line.scope:
                async with trio.open_nursery() as nursery:
                    for pump in pumps:
                        nursery.start_soon(pump)
                    await trio.sleep_forever()
        finally:
            line.abort()
            await failure_of(line.cut)  # which nobody wants to know

    async with own_tasks() as nursery:
        nursery.start_soon(run)
        try:
            yield
        finally:
            line.abort()


async def failure_of(call: Call) -> BaseException | None:
    """What ``call`` raises. A cancel from outside passes, whatever the library makes of it."""
    try:
        await call()
    except KeyboardInterrupt:
        raise
    except BaseException as problem:
        await trio.lowlevel.checkpoint_if_cancelled()
        return problem
    return None


def words(failure: BaseException) -> str:
    """What went wrong, as the end of a sentence."""
    if isinstance(failure, OSError):
        return why(failure)
    return ": ".join(word for word in (type(failure).__name__, str(failure)) if word)
