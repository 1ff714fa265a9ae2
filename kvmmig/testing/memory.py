"""A channel in memory, and a transport of such: fakes for tests that pass the same suite as the real ones."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import trio

from kvmmig.errors import BadURI, ChannelBroken, ChannelClosed, ConnectFailed
from kvmmig.transport import Channel, Listener, Option, Transport, TransportURI
from kvmmig.transport.toolkit.one_at_a_time import OneAtATime

_MOST_BYTES = 1 << 19
_CAPACITY = 1 << 16


class _Lane:
    """Bytes on their way in one direction."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.held = bytearray()
        self.ended = False  # the sender has closed it in order
        self.broken = False  # one of the two has gone without warning, or the receiver has closed
        self.changed = trio.lowlevel.ParkingLot()
        self.sending, self.receiving = OneAtATime("sending"), OneAtATime("receiving")


class MemoryChannel(Channel):
    """One end of a `memory_channel_pair`."""

    copies = True

    def __init__(self, out: _Lane, into: _Lane, peer: str) -> None:
        self.peer = peer
        self._out = out
        self._in = into
        self._closed = False

    async def send_some(self, buffers: Sequence[memoryview]) -> int:
        lane = self._out
        with lane.sending:
            await trio.lowlevel.checkpoint()
            self._check(lane)
            while len(lane.held) >= lane.capacity:
                await lane.changed.park()
                self._check(lane)
            room = min(lane.capacity - len(lane.held), _MOST_BYTES)
            start = room
            for buffer in buffers:
                lane.held += buffer[:room]
                room -= min(len(buffer), room)
                if not room:
                    break
            lane.changed.unpark_all()
            return start - room

    async def receive_some(self, buffer: memoryview) -> int:
        lane = self._in
        with lane.receiving:
            await trio.lowlevel.checkpoint()
            self._check(lane)
            while not lane.held and not lane.ended:
                await lane.changed.park()
                self._check(lane)
            size = min(len(buffer), len(lane.held), _MOST_BYTES)
            buffer[:size] = lane.held[:size]
            del lane.held[:size]
            lane.changed.unpark_all()
            return size

    async def flush(self) -> None:
        """What was accepted has been copied, so there is nothing to wait for."""
        await trio.lowlevel.checkpoint()
        self._check(self._out)

    def abort(self) -> None:
        """The other end finds both directions broken."""
        if not self._closed:
            self._out.broken = True
            self._close()

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()
        if not self._closed:
            self._out.ended = True
            self._close()

    def _close(self) -> None:
        self._closed = True
        self._in.broken = True
        self._in.changed.unpark_all()
        self._out.changed.unpark_all()

    def _check(self, lane: _Lane) -> None:
        if self._closed:
            raise ChannelClosed(f"the memory channel to {self.peer} was closed by this side")
        if lane.broken:
            raise ChannelBroken(f"the memory channel to {self.peer} is broken: the other side has closed it")


def memory_channel_pair(*, capacity: int = _CAPACITY) -> tuple[MemoryChannel, MemoryChannel]:
    """Two connected channels, two-way, in this process; each direction holds up to ``capacity`` bytes.

    Whoever holds an end closes it. Needs a running trio, uses no threads and no file descriptors.
    """
    if capacity < 1:
        raise ValueError(f"a capacity of {capacity} bytes would never move one; give at least 1")
    there, back = _Lane(capacity), _Lane(capacity)
    return MemoryChannel(there, back, "memory/b"), MemoryChannel(back, there, "memory/a")


class MemoryTransport(Transport):
    """Inside of one ``trio.run``: ``memory:NAME``. One listens at a time, and several may connect."""

    summary = "a channel in memory, for tests"
    syntax = "memory:NAME[?capacity=BYTES]"

    options = (Option("capacity", "bytes that each direction holds", default=str(_CAPACITY)),)

    def __init__(self, uri: TransportURI) -> None:
        super().__init__(uri)
        if not re.fullmatch("[0-9]{1,12}", self.option("capacity")):
            raise BadURI(f"{str(uri)!r}: capacity is a number of bytes, such as capacity={_CAPACITY}")
        self._capacity = int(self.option("capacity"))

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Channel]:
        await trio.lowlevel.checkpoint()
        waiting = _places().get(self.uri.target)
        if waiting is None:
            raise ConnectFailed(f"nobody listens at {self.uri}; start the other side first")
        ours, theirs = memory_channel_pair(capacity=self._capacity)
        waiting.send_nowait(theirs)
        async with ours:
            yield ours

    @asynccontextmanager
    async def listen(self) -> AsyncIterator[Listener]:
        await trio.lowlevel.checkpoint()
        name = self.uri.target
        if name in _places():
            raise ConnectFailed(f"somebody else listens at {self.uri} already; take another name")
        into, waiting = trio.open_memory_channel[MemoryChannel](1000)
        _places()[name] = into
        try:
            yield _MemoryListener(self.uri, waiting)
        finally:
            del _places()[name]
            into.close()
            while True:  # the sources that nobody has accepted
                try:
                    waiting.receive_nowait().abort()
                except (trio.WouldBlock, trio.EndOfChannel):
                    break
            waiting.close()


class _MemoryListener(Listener):
    def __init__(self, uri: TransportURI, waiting: trio.MemoryReceiveChannel[MemoryChannel]) -> None:
        self.uri = uri
        self._waiting = waiting

    @asynccontextmanager
    async def accept(self) -> AsyncIterator[Channel]:
        try:
            channel = await self._waiting.receive()
        except (trio.EndOfChannel, trio.ClosedResourceError) as error:
            raise ConnectFailed(f"{self.uri} is not listened at any more") from error
        async with channel:
            yield channel


_Places = dict[str, trio.MemorySendChannel[MemoryChannel]]
_places_of_this_run: trio.lowlevel.RunVar[_Places] = trio.lowlevel.RunVar("memory transports that listen")


def _places() -> _Places:
    try:
        return _places_of_this_run.get()
    except LookupError:
        places: _Places = {}
        _places_of_this_run.set(places)
        return places
