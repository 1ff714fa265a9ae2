"""A transport of one's own, registered and used: ``pair:``, the two ends of a socket pair.

    python examples/own_transport.py

The three classes in the middle are all that it takes. transports/README.md says how a package offers one to
everybody, and how to run the conformance suite on it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import trio

from kvmmig import IncomingMigration, Machine, MachineConfig, OutgoingMigration, guests, transport_for
from kvmmig.errors import ChannelBroken, ChannelClosed
from kvmmig.transport.registry import register
from kvmmig.transport import Channel, ChannelFeatures, Listener, Transport


class PairChannel(Channel):
    features = ChannelFeatures(two_way=True)

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self._socket = sock
        self.peer = "the other end of a pair"

    async def send_some(self, buffers: Sequence[memoryview]) -> int:
        try:
            return await self._socket.sendmsg(buffers[:16])  # a prefix will do
        except OSError as error:
            raise ChannelBroken(f"the pair is broken: {error.strerror}") from error
        except trio.ClosedResourceError as error:
            raise ChannelClosed("this end of the pair was closed") from error

    async def receive_some(self, buffer: memoryview) -> int:
        try:
            return await self._socket.recv_into(buffer)
        except OSError as error:
            raise ChannelBroken(f"the pair is broken: {error.strerror}") from error
        except trio.ClosedResourceError as error:
            raise ChannelClosed("this end of the pair was closed") from error

    async def flush(self) -> None:  # what the kernel took, the other end can read
        await trio.lowlevel.checkpoint()

    def abort(self) -> None:
        self._socket.close()

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()
        self._socket.close()


class PairListener(Listener):
    uri = "pair:"
    connected, arrivals = trio.open_memory_channel[Channel](math.inf)

    async def accept(self) -> Channel:
        return await self.arrivals.receive()

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


class PairTransport(Transport):
    summary = "the two ends of a socket pair, inside one process"
    syntax = "pair:"

    async def connect(self) -> Channel:
        ours, theirs = trio.socket.socketpair()
        await PairListener.connected.send(PairChannel(theirs))
        return PairChannel(ours)

    async def listen(self) -> Listener:
        return PairListener()


async def receive() -> None:
    channel = await (await transport_for("pair:").listen()).accept()
    async with IncomingMigration(channel).machine() as machine:
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
