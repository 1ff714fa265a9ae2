"""``unix:PATH``: a Unix stream socket, for two processes on one host.

The socket's file is private to its user, is removed when nobody listens any more, and takes the place only
of one that a dead listener has left behind.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat

import trio

from kvmmig.errors import BadURI, ConnectFailed
from kvmmig.migration.transport import Channel, Listener, Transport, TransportURI
from kvmmig_transports._sockets import WORDS, SocketChannel, SocketListener
from kvmmig_transports._threads import attempt, open_in_thread
from kvmmig_transports._words import kind, why

_LONGEST = 107  # bytes: sun_path of <sys/un.h> without its final zero
_PRIVATE = 0o600
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
        def drop(made: tuple[socket.socket, _SocketFile]) -> None:
            sock, file = made
            file.remove()
            sock.close()

        return _UnixListener(self.uri, *await open_in_thread(self._bind, drop))

    # Threads run these: looking up a path may wait for a disk.

    def _knock(self) -> socket.socket | None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            sock.connect(self._path)
        except BlockingIOError:
            sock.close()
            return None
        except OSError as error:
            sock.close()
            raise ConnectFailed(f"can't connect to {self.uri}: {why(error, _WORDS)}") from error
        return sock

    def _bind(self) -> tuple[socket.socket, _SocketFile]:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._clear()
            os.fchmod(sock.fileno(), _PRIVATE)  # before it has a name; bind gives the file these rights
            sock.bind(self._path)
            sock.listen()
            return sock, _SocketFile(self._path)
        except OSError as error:
            sock.close()
            reason = _TAKEN if error.errno == errno.EADDRINUSE else why(error)
            raise ConnectFailed(f"can't listen on {self.uri}: {reason}") from error
        except BaseException:
            sock.close()
            raise

    def _clear(self) -> None:
        """Remove a socket that nobody listens on; refuse to touch anything else."""
        try:
            mode = os.lstat(self._path).st_mode
        except FileNotFoundError:
            return
        if not stat.S_ISSOCK(mode):
            raise ConnectFailed(
                f"can't listen on {self.uri}: it is {kind(mode)}; name a path where nothing is"
            )
        # A datagram socket can't connect to a stream socket, but learns whether somebody has it open; and a
        # listener takes no notice of the attempt.
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect(self._path)
            except ConnectionRefusedError:
                os.unlink(self._path)
                return
            except OSError as error:
                if error.errno != errno.EPROTOTYPE:
                    raise
        raise ConnectFailed(f"can't listen on {self.uri}: {_TAKEN}")


def _channel(sock: trio.socket.SocketType, path: str) -> Channel:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)  # as much of it as net.core.wmem_max allows
    return SocketChannel(sock, path, _WORDS)


def _close(sock: socket.socket | None) -> None:
    if sock is not None:
        sock.close()


class _SocketFile:
    """The file that was bound, to be removed unless another has taken its name meanwhile."""

    def __init__(self, path: str) -> None:
        self._path = os.path.abspath(path)
        self._identity = self._look()

    def remove(self) -> None:
        with contextlib.suppress(OSError):
            if self._look() == self._identity:
                os.unlink(self._path)

    def _look(self) -> tuple[int, int]:
        found = os.lstat(self._path)
        return found.st_dev, found.st_ino


class _UnixListener(SocketListener):
    def __init__(self, uri: TransportURI, sock: socket.socket, file: _SocketFile) -> None:
        def channel(accepted: trio.socket.SocketType) -> Channel:
            return _channel(accepted, uri.target)  # who connects has no name of its own

        super().__init__(trio.socket.from_stdlib_socket(sock), str(uri), channel, _WORDS)
        self._file = file

    async def aclose(self) -> None:
        """Removes the socket's file, also when it is cancelled."""
        if not self._closed:
            attempt(self._file.remove, f"unlink {self.uri}")
        await super().aclose()
