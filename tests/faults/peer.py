"""The other side, a process of its own: ``python -m tests.faults.peer URI [HOLD]`` prints where it listens.

HOLD is what it keeps back for ever: ``accept`` or ``ready``, which are its first and its second word, or
``everything``, when it listens but has no room for a connection. A number on its standard input is
the bytes a second at which it reads from there on; it prints that number too.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Sequence

import trio

from kvmmig.errors import KvmmigError
from kvmmig.migration.incoming import IncomingMigration
from kvmmig.transport.registry import transport_for
from kvmmig.transport import Channel, TransportURI

_SIP = 64 << 10
_LIFE = 120.0  # seconds after which nobody can still be interested


class ReluctantChannel(Channel):
    """Passes everything on, but keeps back one of its words, and reads at ``rate`` where that is not 0."""

    def __init__(self, channel: Channel, kept_back: int) -> None:
        self.features, self.peer = channel.features, channel.peer
        self.rate = 0
        self._channel = channel
        self._words = 0
        self._kept_back = kept_back

    async def send_some(self, buffers: Sequence[memoryview]) -> int:
        self._words += 1
        if self._words == self._kept_back:
            await trio.sleep_forever()
        return await self._channel.send_some(buffers)

    async def receive_some(self, buffer: memoryview) -> int:
        if self.rate:
            buffer = buffer[:_SIP]
            await trio.sleep(len(buffer) / self.rate)
        return await self._channel.receive_some(buffer)

    async def flush(self) -> None:
        await self._channel.flush()

    def abort(self) -> None:
        self._channel.abort()

    async def aclose(self) -> None:
        await self._channel.aclose()


async def receive(uri: str, hold: str) -> None:
    """Take one guest in."""
    async with await transport_for(uri).listen() as listener:
        print(listener.uri, flush=True)
        channel = await listener.accept()
    reluctant = ReluctantChannel(channel, {"accept": 1, "ready": 2}.get(hold, 0))
    async with trio.open_nursery() as nursery:

        async def obey() -> None:
            async for line in trio.lowlevel.FdStream(0):
                reluctant.rate = int(line)
                print(reluctant.rate, flush=True)

        if uri != "fd:0":
            nursery.start_soon(obey)
        async with IncomingMigration(reluctant).machine():
            await trio.sleep_forever()


async def have_no_room(uri: str) -> None:
    """Listen with a queue of one place, and take that place."""
    parsed = TransportURI.parse(uri)
    if parsed.scheme == "tcp":
        host, _, port = parsed.target.rpartition(":")
        listener = socket.create_server((host, int(port)), backlog=0)
        host, port = listener.getsockname()
        print(f"tcp:{host}:{port}", flush=True)
    else:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(parsed.target)
        listener.listen(0)
        print(uri, flush=True)
    with listener, socket.socket(listener.family) as filler:
        filler.connect(listener.getsockname())
        await trio.sleep_forever()


async def main() -> None:
    uri, hold = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else ""
    with trio.move_on_after(_LIFE):
        if hold == "everything":
            await have_no_room(uri)
        else:
            await receive(uri, hold)


if __name__ == "__main__":
    try:
        trio.run(main)
    except* KvmmigError:
        sys.exit(1)
