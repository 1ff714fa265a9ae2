"""``unix:PATH``: a Unix stream socket, for two processes on one host.

The socket's file is private to its user, is removed when nobody listens any more, and takes the place only
of one that a dead listener has left behind.
"""

from __future__ import annotations

import errno
import os
import socket

import trio

from kvmmig.errors import BadURI, ConnectFailed
from kvmmig.transport import Channel, Listener, Transport, TransportURI
from kvmmig.transport.toolkit.unixsockets import PathTaken, SocketFile, knock, listen
from kvmmig.transport.toolkit.sockets import WORDS, SocketChannel, SocketListener
from kvmmig.transport.toolkit.workers import attempt, open_in_thread
from kvmmig.transport.toolkit.words import kind, why

_LONGEST = 107  # bytes: sun_path of <sys/un.h> without its final zero
_BACKLOG = 16
# What fits into one call and is copied in about 0.5 ms: 2.6 GB/s where the kernel's 208 KiB gave 1.8 GB/s.
_BUFFER = 1 << 20
_AGAIN = 0.01  # seconds between two knocks at a door where others wait already
_TAKEN = "another process listens there already; choose another path"

_WORDS = {
    **WORDS,
    errno.ENOENT: "there is no such socket; start the other side first",
    errno.ENOTDIR: "a part of that path is no directory",
    errno.EPROTOTYPE: "it is no stream socket",
}


class UnixTransport(Transport):
    """Connects to, or listens on, one socket file."""

    summary = "a Unix socket, to a kvmmig on this host"
    syntax = "unix:PATH"

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

    async def connect(self) -> Channel:
        """Waits where the listener's queue is full, until it has room for one more."""
        while True:
            sock = await open_in_thread(self._knock, _close)
            if sock is not None:
                return _channel(trio.socket.from_stdlib_socket(sock), self._path)
            await trio.sleep(_AGAIN)

    async def listen(self) -> Listener:
        def drop(made: tuple[socket.socket, SocketFile]) -> None:
            sock, file = made
            file.remove()
            sock.close()

        return _UnixListener(self.uri, *await open_in_thread(self._bind, drop))

    # Threads run these: looking up a path may wait for a disk.

    def _knock(self) -> socket.socket | None:
        try:
            return knock(self._path)
        except OSError as error:
            raise ConnectFailed(f"can't connect to {self.uri}: {why(error, _WORDS)}") from error

    def _bind(self) -> tuple[socket.socket, SocketFile]:
        try:
            return listen(self._path, _BACKLOG)
        except PathTaken as taken:
            reason = f"it is {kind(taken.mode)}; name a path where nothing is" if taken.mode else _TAKEN
            raise ConnectFailed(f"can't listen on {self.uri}: {reason}") from taken
        except OSError as error:
            raise ConnectFailed(f"can't listen on {self.uri}: {why(error)}") from error


def _channel(sock: trio.socket.SocketType, path: str) -> Channel:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)  # as much of it as net.core.wmem_max allows
    return SocketChannel(sock, path, _WORDS)


def _close(sock: socket.socket | None) -> None:
    if sock is not None:
        sock.close()


class _UnixListener(SocketListener):
    def __init__(self, uri: TransportURI, sock: socket.socket, file: SocketFile) -> None:
        def channel(accepted: trio.socket.SocketType) -> Channel:
            return _channel(accepted, uri.target)  # who connects has no name of its own

        super().__init__(trio.socket.from_stdlib_socket(sock), str(uri), channel, _WORDS)
        self._file = file

    async def aclose(self) -> None:
        """Removes the socket's file, also when it is cancelled."""
        if not self._closed:
            attempt(self._file.remove, f"unlink {self.uri}")
        await super().aclose()
