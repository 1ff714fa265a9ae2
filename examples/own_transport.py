"""A transport of one's own, registered and used: ``pair:``, the two ends of a socket pair.

    python examples/own_transport.py

The two classes in the middle are all that it takes. transports/README.md says how a package offers one to
everybody, and how to run the conformance suite on it.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from kvmmig import IncomingMigration, Machine, MachineConfig, OutgoingMigration, guests
from kvmmig.transport import Channel, Listener, Transport, TransportURI, register
from kvmmig.transport.toolkit import SocketChannel

connections, arrivals = trio.open_memory_channel[trio.socket.SocketType](math.inf)


class PairTransport(Transport):
    summary = "the two ends of a socket pair, inside one process"
    syntax = "pair:"

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Channel]:
        ours, theirs = trio.socket.socketpair()
        await connections.send(theirs)
        async with SocketChannel(ours, "the other end of a pair") as channel:
            yield channel

    @asynccontextmanager
    async def listen(self) -> AsyncIterator[Listener]:
        yield PairListener()


class PairListener(Listener):
    uri = TransportURI("pair", "")

    @asynccontextmanager
    async def accept(self) -> AsyncIterator[Channel]:
        async with SocketChannel(await arrivals.receive(), "the other end of a pair") as channel:
            yield channel


async def receive() -> None:
    async with IncomingMigration("pair:").machine() as machine:
        print(f"the guest {machine.state} at the other end")


async def main() -> None:
    register("pair", PairTransport)
    program = guests.find("dirtier").program(memory=64 << 20, cpus=1, settings={"hot": "1MiB"})
    async with Machine.open(MachineConfig(memory=64 << 20)) as source, trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        await source.load(program)
        await source.start()
        await OutgoingMigration(source, "pair:").run()


if __name__ == "__main__":
    trio.run(main)
