"""Holding a migration at one call of its channel, so that a fault strikes exactly there.

A hello to a file, or the flush at its end, is over within a millisecond; held, it lasts until the fault has
struck. The channel behind is the real one, and when it is let go the call goes on as it would have.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import trio

from kvmmig.transport import Channel, Listener, PassingChannel, Transport
from tests.faults.cells import Moment


class Hold:
    """Where to hold: `Moment.HELLO` is before the first send, `Moment.COMMIT` before the first flush."""

    def __init__(self, moment: Moment) -> None:
        self.moment = moment
        self.reached = trio.Event()
        self.released = trio.Event()

    async def wait(self, moment: Moment) -> None:
        """Called at each such call; returns at once after the release."""
        if moment is self.moment:
            self.reached.set()
            await self.released.wait()


class HeldTransport(Transport):
    """The transport behind, holding its channel at one moment. ``settle`` is awaited after the connect."""

    def __init__(
        self, transport: Transport, hold: Hold | None, settle: Callable[[], Awaitable[None]]
    ) -> None:
        self.uri = transport.uri
        self._transport = transport
        self._hold = hold
        self._settle = settle

    async def connect(self) -> Channel:
        channel = await self._transport.connect()
        try:
            await self._settle()
        except BaseException:
            channel.abort()
            raise
        return HeldChannel(channel, self._hold) if self._hold else channel

    async def listen(self) -> Listener:
        return await self._transport.listen()


class HeldChannel(PassingChannel):
    """The channel behind, held at one moment."""

    def __init__(self, channel: Channel, hold: Hold) -> None:
        super().__init__(channel)
        self._hold = hold

    async def send_some(self, buffers: Sequence[memoryview]) -> int:
        await self._hold.wait(Moment.HELLO)
        return await super().send_some(buffers)

    async def flush(self) -> None:
        await self._hold.wait(Moment.COMMIT)
        await super().flush()
