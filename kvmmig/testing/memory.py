"""A channel in memory: a fake for tests that passes the same suite as the real ones."""

from __future__ import annotations

from collections.abc import Sequence

import trio

from kvmmig.errors import ChannelBroken, ChannelClosed
from kvmmig.transport import Channel, ChannelFeatures, OneAtATime

_MOST_BYTES = 1 << 20


class _Lane:
    """Bytes on their way in one direction."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.held = bytearray()
        self.ended = False  # the sender has closed it in order
        self.broken = False  # one of the two has gone without warning, or the receiver has closed
        self.changed = trio.lowlevel.ParkingLot()


class MemoryChannel(Channel):
    """One end of a `memory_channel_pair`."""

    features = ChannelFeatures(two_way=True)

    def __init__(self, out: _Lane, into: _Lane, peer: str) -> None:
        self.peer = peer
        self._out = out
        self._in = into
        self._sending = OneAtATime("sending")
        self._receiving = OneAtATime("receiving")
        self._closed = False

    async def send_some(self, buffers: Sequence[memoryview]) -> int:
        lane = self._out
        with self._sending:
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
        with self._receiving:
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


def memory_channel_pair(*, capacity: int = 1 << 16) -> tuple[MemoryChannel, MemoryChannel]:
    """Two connected channels, two-way, in this process; each direction holds up to ``capacity`` bytes.

    Whoever holds an end closes it. Needs a running trio, uses no threads and no file descriptors.
    """
    if capacity < 1:
        raise ValueError(f"a capacity of {capacity} bytes would never move one; give at least 1")
    there, back = _Lane(capacity), _Lane(capacity)
    return MemoryChannel(there, back, "memory/b"), MemoryChannel(back, there, "memory/a")
