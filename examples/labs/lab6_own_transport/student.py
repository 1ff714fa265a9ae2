"""Lab 6: a transport of your own. Fill the gaps that say TODO; `kvmmig lab check .` tells how you do."""

from __future__ import annotations

import os
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, closing
from pathlib import Path

import trio

import kvmmig
from kvmmig.errors import ChannelBroken, ConnectFailed, KvmmigError
from kvmmig.transport import Channel, Listener, Transport, TransportURI, register
from kvmmig.transport.toolkit import SocketListener, why


class OwnChannel(Channel):
    """One connection. The promises are those of kvmmig/transport/contract.py."""

    def __init__(self, sock: trio.socket.SocketType, peer: str) -> None:
        self.peer = peer
        self._socket = sock

    async def send_some(self, buffers: Sequence[memoryview]) -> int:
        # TODO 1: one call of self._socket's that accepts a prefix of the buffers, at most 1024 of them.
        raise ChannelBroken("nothing can be sent yet")

    async def receive_some(self, buffer: memoryview) -> int:
        # TODO 2: one call that fills a prefix of the buffer.
        raise ChannelBroken("nothing can be received yet")

    async def flush(self) -> None:
        # TODO 3: return when the other side's kernel has all. When does a Unix socket say that it has?
        await trio.lowlevel.checkpoint()

    def abort(self) -> None:
        # TODO 3: end it at once; whoever waits in a call is woken by that.
        pass

    async def aclose(self) -> None:
        # TODO 3: end it in order, also where it was ended before. Always a checkpoint.
        await trio.lowlevel.checkpoint()

    # TODO 4: two tasks that send at a time: OneAtATime. An error of the kernel's is a ChannelBroken, with a
    # sentence; a call on a channel that this side has closed is a ChannelClosed.


class OwnTransport(Transport):
    """``own:PATH``: a Unix socket at PATH."""

    summary = "a Unix socket, written in lab 6"
    syntax = "own:PATH"
    target_is_path = True

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Channel]:
        with trio.socket.socket(trio.socket.AF_UNIX) as sock:
            try:
                await sock.connect(self.uri.target)
            except OSError as error:
                raise ConnectFailed(f"can't connect to {self.uri}: {why(error)}") from error
            async with OwnChannel(sock, self.uri.target) as channel:
                yield channel

    @asynccontextmanager
    async def listen(self) -> AsyncIterator[Listener]:
        with trio.socket.socket(trio.socket.AF_UNIX) as sock:
            try:
                await sock.bind(self.uri.target)
            except OSError as error:
                raise ConnectFailed(f"can't listen on {self.uri}: {why(error)}") from error
            sock.listen()
            path = self.uri.target
            with closing(SocketListener(sock, self.uri, lambda one: OwnChannel(one, path))) as listener:
                try:
                    yield listener
                finally:
                    os.unlink(path)


async def main() -> None:
    """Move a guest to the other end of it, in this process."""
    register("own", OwnTransport)
    with tempfile.TemporaryDirectory(prefix="kvmmig-") as directory:
        uri = TransportURI("own", str(Path(directory) / "guest"))

        async def destination(*, task_status: trio.TaskStatus[None]) -> None:
            async with kvmmig.receive(uri, on_listening=lambda _: task_status.started()) as machine:
                print(f"the guest {machine.state} at the other end")

        async with kvmmig.open_machine("dirtier", memory="64MiB", settings={"hot": "1MiB"}) as source:
            await source.start()
            async with trio.open_nursery() as nursery:
                await nursery.start(destination)
                try:
                    figures = await kvmmig.migrate(source, uri)
                    print(f"{figures.sent_bytes} bytes, a downtime of {(figures.downtime or 0) * 1e3:.0f} ms")
                except KvmmigError as error:
                    print(f"it did not move: {error}")
                    nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main)
