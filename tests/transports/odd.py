"""A stranger's transport, as odd as a test wants it, and ways of using it through the guard."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

from kvmmig.errors import ChannelBroken, TransportError
from kvmmig.testing import MemoryTransport, memory_channel_pair
from kvmmig.transport import AnyChannel, PassingChannel, Transport, TransportURI
from kvmmig.transport.guard import GuardedChannel
from kvmmig.transport.supervision import connected, listening

WHO = r"the transport 'odd' \(from odd-things 0.1\)"
HELLO = [memoryview(b"hello")]
CALLS: dict[str, Callable[[GuardedChannel], Awaitable[object]]] = {
    "send_some": lambda channel: channel.send_some(HELLO),
    "receive_some": lambda channel: channel.receive_some(memoryview(bytearray(5))),
    "flush": lambda channel: channel.flush(),
    "aclose": lambda channel: channel.aclose(),
}


class Odd(MemoryTransport):
    """A stranger's, whose channels are of another class."""

    origin = "from odd-things 0.1"

    def __init__(self, channel: Callable[[AnyChannel], Any] = PassingChannel) -> None:
        super().__init__(TransportURI("odd", "a"))
        self._around = channel

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Any]:
        ours, self.theirs = memory_channel_pair(capacity=1000)
        yield self._around(ours)


@asynccontextmanager
async def use(transport: Transport) -> AsyncIterator[GuardedChannel]:
    async with trio.open_nursery() as strays:
        async with connected(transport, strays) as channel:
            yield channel
        strays.cancel_scope.cancel()


async def connect(transport: Transport) -> None:
    """Connect, and leave again."""
    problem: TransportError | None = None
    async with trio.open_nursery() as strays:
        try:
            async with connected(transport, strays):
                pass
        except TransportError as error:
            problem = error
    if problem is not None:
        raise problem


async def listen(transport: Transport, *, accept: bool = False) -> None:
    """Listen, accept a channel if asked, and leave again."""
    problem: TransportError | None = None
    async with trio.open_nursery() as strays:
        try:
            async with listening(transport, strays) as listener:
                if accept:
                    async with listener.accept():
                        pass
        except TransportError as error:
            problem = error
    if problem is not None:
        raise problem


async def fail_with(problem: BaseException) -> None:
    await trio.lowlevel.checkpoint()
    raise problem


async def require_broken(channel: GuardedChannel, why: str = WHO) -> None:
    """Every call raises the same sentence again; abort is quiet."""
    for call in CALLS.values():
        with pytest.raises(ChannelBroken, match=why):
            await call(channel)
    channel.abort()
