"""Lab 6, one solution: a Unix socket, of which every call is one call of trio's."""

from __future__ import annotations

import os
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path

import trio

import kvmmig
from kvmmig.errors import ChannelBroken, ChannelClosed, ConnectFailed, KvmmigError
from kvmmig.transport import Channel, Listener, Transport, TransportURI, register
from kvmmig.transport.toolkit import OneAtATime, SocketListener, why

_MOST_BUFFERS = 1024  # that one call of the kernel's takes: IOV_MAX


class OwnChannel(Channel):
    """One connection. The promises are those of kvmmig/transport/contract.py."""

    def __init__(self, sock: trio.socket.SocketType, peer: str) -> None:
        self.peer = peer
        self._socket = sock
        self._closed = False
        self._sending = OneAtATime("sending")
        self._receiving = OneAtATime("receiving")

    async def send_some(self, buffers: Sequence[memoryview]) -> int:
        with self._sending, self._translated():
            return await self._socket.sendmsg(buffers[:_MOST_BUFFERS])

    async def receive_some(self, buffer: memoryview) -> int:
        with self._receiving, self._translated():
            return await self._socket.recv_into(buffer)

    async def flush(self) -> None:
        with self._translated():
            await trio.lowlevel.checkpoint()  # what a Unix socket has accepted, the other side's kernel has

    def abort(self) -> None:
        self._closed = True
        self._socket.close()

    async def aclose(self) -> None:
        try:
            await trio.lowlevel.checkpoint()
        finally:
            self.abort()

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """The kernel's errors become sentences, and a closed channel is one."""
        if self._closed:
            raise ChannelClosed(f"the connection to {self.peer} was closed by this side")
        try:
            yield
        except trio.ClosedResourceError as error:
            raise ChannelClosed(f"the connection to {self.peer} was closed by this side") from error
        except OSError as error:
            raise ChannelBroken(f"the connection to {self.peer} is broken: {why(error)}") from error


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
