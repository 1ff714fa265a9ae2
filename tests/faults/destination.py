"""A destination in a process of its own: ``python -m tests.faults.destination URI [WORD]``.

It prints where it listens. WORD is what it keeps back for ever: ``accept``, ``ready`` or ``running``, which
are its first, second and third word, or ``everything``, when it listens but has no room for a connection. A
number on its standard input is the bytes a second at which it reads from there on; it prints that number too.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import trio

from kvmmig.errors import KvmmigError
from kvmmig.migration.incoming import IncomingMigration
from kvmmig.transport import AnyChannel, PassingChannel, Side, Transport, TransportURI, Wrapper, transport_for

_SIP = 64 << 10
_LIFE = 120.0  # seconds after which nobody can still be interested
_WORDS = ("accept", "ready", "running")


class ReluctantWrapper(Wrapper):
    """Keeps back one of its side's words, and reads at ``rate`` bytes a second where that is not 0."""

    def __init__(self, inner: Transport, kept_back: str) -> None:
        super().__init__(replace(inner.uri, wrappers=("reluctant", *inner.uri.wrappers)), inner)
        self.rate = 0
        self._kept_back = _WORDS.index(kept_back) + 1 if kept_back else 0

    @asynccontextmanager
    async def wrap(self, channel: AnyChannel, *, side: Side) -> AsyncIterator[AnyChannel]:
        yield ReluctantChannel(channel, self._kept_back, lambda: self.rate)


class ReluctantChannel(PassingChannel):
    """Keeps back the word of that number; 0 is none."""

    def __init__(self, channel: AnyChannel, kept_back: int, rate: Callable[[], int]) -> None:
        super().__init__(channel)
        self._words = 0
        self._kept_back = kept_back
        self._rate = rate

    async def send_some(self, buffers: Sequence[memoryview]) -> int:
        self._words += 1
        if self._words == self._kept_back:
            await trio.sleep_forever()
        return await super().send_some(buffers)

    async def receive_some(self, buffer: memoryview) -> int:
        if rate := self._rate():
            buffer = buffer[:_SIP]
            await trio.sleep(len(buffer) / rate)
        return await super().receive_some(buffer)


async def receive(uri: str, kept_back: str) -> None:
    """Take one guest in."""
    transport = ReluctantWrapper(transport_for(uri), kept_back)
    async with trio.open_nursery() as nursery:

        async def obey() -> None:
            async for line in trio.lowlevel.FdStream(0):
                transport.rate = int(line)
                print(transport.rate, flush=True)

        if uri != "fd:0":
            nursery.start_soon(obey)
        incoming = IncomingMigration(
            transport, keep_listening=False, on_listening=lambda where: print(where, flush=True)
        )
        async with incoming.machine():
            await trio.sleep_forever()


async def have_no_room(uri: str) -> None:
    """Listen with a queue of one place, and take that place."""
    parsed = TransportURI.parse(uri)
    if parsed.scheme == "tcp":
        name, _, port = parsed.target.rpartition(":")
        listener = socket.create_server((name, int(port)), backlog=0)
        name, port = listener.getsockname()
        print(f"tcp:{name}:{port}", flush=True)
    else:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(parsed.target)
        listener.listen(0)
        print(uri, flush=True)
    with listener, socket.socket(listener.family) as filler:
        filler.connect(listener.getsockname())
        await trio.sleep_forever()


async def main() -> None:
    uri, kept_back = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else ""
    with trio.move_on_after(_LIFE):
        if kept_back == "everything":
            await have_no_room(uri)
        else:
            await receive(uri, kept_back)


if __name__ == "__main__":
    try:
        trio.run(main)
    except* KvmmigError:
        sys.exit(1)
