"""``unix:PATH``: a Unix stream socket, for two processes on one host.

The socket's file is private to its user, is removed when nobody listens any more, and takes the place only
of one that a dead listener has left behind.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing

import trio

from kvmmig.errors import BadURI, ConnectFailed
from kvmmig.transport import Channel, Listener, Transport, TransportURI
from kvmmig.transport.toolkit import (
    SOCKET_WORDS,
    FarEnd,
    Lanes,
    SocketChannel,
    SocketListener,
    attempt,
    kind,
    open_in_thread,
    unixsockets,
    why,
)

_LONGEST = 107  # bytes: sun_path of <sys/un.h> without its final zero
_BACKLOG = 16
# What fits into one call and is copied in about 0.5 ms: 2.6 GB/s where the kernel's 208 KiB gave 1.8 GB/s.
_BUFFER = 1 << 20
_AGAIN = 0.01  # seconds between two attempts to connect where others wait already
_TAKEN = "another process listens there already; choose another path"

_WORDS = {
    **SOCKET_WORDS,
    errno.ENOENT: "there is no such socket; start the other side first",
    errno.ENOTDIR: "a part of that path is no directory",
    errno.EPROTOTYPE: "it is no stream socket",
}


class UnixTransport(Transport):
    """Connects to, or listens on, one socket file."""

    summary = "a Unix socket, to a kvmmig on this host"
    syntax = "unix:PATH[?lanes=N&user=USER]"
    options = (Lanes.option, FarEnd.option)

    def __init__(self, uri: TransportURI) -> None:
        super().__init__(uri)
        self._path = uri.target
        if not self._path or "\0" in self._path:
            raise BadURI(f"{str(uri)!r} names no socket: write unix:PATH, such as unix:/run/kvmmig.sock")
        length = len(os.fsencode(self._path))
        if length > _LONGEST:
            raise BadURI(
                f"{str(uri)!r}: the path has {length} bytes, and a socket's may have {_LONGEST}; choose a "
                "shorter one"
            )
        self._far_end = FarEnd(uri, self.option("user"))
        self._lanes = Lanes(uri, self.option("lanes"))

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Channel]:
        """Waits where the listener's queue is full, until it has room for one more."""
        async with self._lanes.connect(self._connection) as channel:
            yield channel

    @asynccontextmanager
    async def listen(self) -> AsyncIterator[Listener]:
        """The socket's file is removed at the end, also after a cancel."""
        self._far_end.check_listening()

        def drop(made: tuple[socket.socket, unixsockets.SocketFile]) -> None:
            made[1].remove()
            made[0].close()

        sock, file = await open_in_thread(self._bound, drop)
        listening = trio.socket.from_stdlib_socket(sock)
        where = TransportURI("unix", self._path)
        with closing(
            self._lanes.listener(SocketListener(listening, where, self._channel, _WORDS))
        ) as listener:
            try:
                yield listener
            finally:
                attempt(file.remove, f"unlink {self.uri}")

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[SocketChannel]:
        while True:
            sock = await open_in_thread(self._connected, _close)
            if sock is not None:
                break
            await trio.sleep(_AGAIN)
        async with self._channel(trio.socket.from_stdlib_socket(sock)) as channel:
            self._far_end.check(channel)
            yield channel

    def _channel(self, sock: trio.socket.SocketType) -> SocketChannel:
        # as much of it as net.core.wmem_max allows
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
        return SocketChannel(sock, self._path, _WORDS)  # who connects has no name of its own

    # Threads run these: looking up a path may wait for a disk.

    def _connected(self) -> socket.socket | None:
        try:
            return unixsockets.try_connect(self._path)
        except OSError as error:
            raise ConnectFailed(f"can't connect to {self.uri}: {why(error, _WORDS)}") from error

    def _bound(self) -> tuple[socket.socket, unixsockets.SocketFile]:
        try:
            return unixsockets.listen(self._path, _BACKLOG)
        except unixsockets.PathTaken as taken:
            reason = f"it is {kind(taken.mode)}; name a path where nothing is" if taken.mode else _TAKEN
            raise ConnectFailed(f"can't listen on {self.uri}: {reason}") from taken
        except OSError as error:
            raise ConnectFailed(f"can't listen on {self.uri}: {why(error)}") from error


def _close(sock: socket.socket | None) -> None:
    if sock is not None:
        sock.close()
