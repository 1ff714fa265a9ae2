"""The sockets of a monitor: one that listens, one that is connected to who listens, one that was handed over.

A Unix socket's file is private to its user from the moment it exists, and takes the place only of one that
a dead monitor has left behind. TCP has no such guard. On a loopback address, which is the default, the kernel
says whose the other end is; elsewhere clients prove that they know a secret, or somebody has said aloud that
nobody is asked.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import trio

from kvmmig.errors import BadURI, ConnectFailed
from kvmmig.qmp.address import LOOPBACK, Address, FdAddress, TcpAddress, UnixAddress
from kvmmig.qmp.secret import read_secret
from kvmmig.transport import descriptors
from kvmmig.transport.peers import is_loopback
from kvmmig.transport.toolkit import TCP_WORDS, tcpsockets, unixsockets, why

_AGAIN = 0.01  # seconds between two attempts to connect where others wait already
_BACKLOG = 64

_WORDS: Mapping[int, str] = {
    **TCP_WORDS,
    errno.ECONNREFUSED: "nobody listens there",
    errno.ENOTDIR: "a part of that path is no directory",
    errno.ENOTSOCK: "it is no socket",
    errno.EPROTOTYPE: "it is no stream socket",
    errno.EACCES: "you have no permission",
    errno.EADDRINUSE: "another process listens there already",
}


@dataclass(frozen=True)
class Listening:
    """A socket that listens, and the secret of its clients, or None where there is none."""

    socket: trio.socket.SocketType
    address: Address
    secret: bytes | None = None


@asynccontextmanager
async def open_listener(address: Address) -> AsyncIterator[Listening]:
    """Listen as long as the block lasts. Raises `ConnectFailed`; `BadURI` where anybody could come in.

    A socket file is removed at the end, unless another has taken its name meanwhile.
    """
    file: unixsockets.SocketFile | None = None
    match address:
        case UnixAddress():
            # A thread, because looking up a path may wait for a disk.
            bound, file = await trio.to_thread.run_sync(_bind_unix, address)
            listening = Listening(trio.socket.from_stdlib_socket(bound), address)
        case TcpAddress():
            listening = await _listen_tcp(address)
        case FdAddress():
            listening = Listening(take_over(address), address, await secret_of(address))
    try:
        yield listening
    finally:
        if file is not None:
            file.remove()
        listening.socket.close()


def take_over(address: FdAddress) -> trio.socket.SocketType:
    """The socket that was handed over; it is the caller's now. Raises `ConnectFailed`, and `BadURI`.

    It may be connected, or listen: `listens` says which.
    """
    name = str(address.number)
    fd = descriptors.find(name)
    try:
        sock = socket.socket(fileno=fd)
    except OSError as error:
        raise ConnectFailed(f"descriptor {name} is no monitor's: {why(error, _WORDS)}") from error
    descriptors.forget(name)
    if sock.type != socket.SOCK_STREAM or sock.family not in (
        socket.AF_UNIX,
        socket.AF_INET,
        socket.AF_INET6,
    ):
        sock.close()
        raise ConnectFailed(f"descriptor {name} is no monitor's: it is no Unix or TCP stream socket")
    return trio.socket.from_stdlib_socket(sock)


def listens(sock: trio.socket.SocketType) -> bool:
    """Whether it waits for others to connect."""
    return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


async def secret_of(address: Address) -> bytes | None:
    """What both sides of a connection there must know; None where nothing. Raises `BadURI`."""
    if isinstance(address, UnixAddress) or not address.secret_file:
        return None
    return await trio.to_thread.run_sync(read_secret, address.secret_file)


async def connect(address: Address) -> trio.socket.SocketType:
    """Connect, and wait where the listener's queue is full. Raises `ConnectFailed`."""
    match address:
        case UnixAddress():
            return await _connect_unix(address)
        case FdAddress():
            return take_over(address)
    addresses = await _resolve(address)
    try:
        sock = await tcpsockets.connect(addresses)
    except OSError as error:
        raise ConnectFailed(f"can't connect to {address}: {why(error, _WORDS)}") from error
    tcpsockets.tune(sock)
    return sock


async def _connect_unix(address: UnixAddress) -> trio.socket.SocketType:
    while True:
        await trio.lowlevel.checkpoint()
        sock = _try_to_connect(address)
        if sock is not None:
            return sock
        await trio.sleep(_AGAIN)


def _try_to_connect(address: UnixAddress) -> trio.socket.SocketType | None:
    try:
        sock = unixsockets.try_connect(address.path)
    except OSError as error:
        words = "there is no such socket" if error.errno == errno.ENOENT else why(error, _WORDS)
        raise ConnectFailed(f"can't connect to {address}: {words}") from error
    return trio.socket.from_stdlib_socket(sock) if sock is not None else None


def _bind_unix(address: UnixAddress) -> tuple[socket.socket, unixsockets.SocketFile]:
    try:
        sock, file = unixsockets.listen(address.path, _BACKLOG)
    except unixsockets.PathTaken as taken:
        what = "something that is no socket has that name" if taken.mode else "another process listens there"
        raise ConnectFailed(f"can't listen on {address}: {what} already; choose another path") from taken
    except OSError as error:
        raise ConnectFailed(f"can't listen on {address}: {why(error, _WORDS)}") from error
    sock.setblocking(False)
    return sock, file


async def _listen_tcp(address: TcpAddress) -> Listening:
    """On the first address that the host's name stands for."""
    secret = await secret_of(address)
    addresses = await _resolve(address)
    if not (secret or address.asks_nobody or is_loopback(addresses[0][1][0])):
        raise BadURI(
            f"{address} can be reached from other hosts, and whoever is let in may do all that you may: "
            f"write tcp:{LOOPBACK}:PORT for your own processes on this host, add ,secret-file=PATH for "
            "clients that know a secret, or ,insecure=on to let everybody in"
        )
    try:
        sock = await tcpsockets.listen(addresses, _BACKLOG)
    except OSError as error:
        raise ConnectFailed(f"can't listen on {address}: {why(error, _WORDS)}") from error
    host, port = sock.getsockname()[:2]
    return Listening(sock, replace(address, host=host, port=port), secret)


async def _resolve(address: TcpAddress) -> list[tcpsockets.SocketAddress]:
    try:
        return await tcpsockets.resolve(address.host, address.port)
    except (OSError, UnicodeError) as error:
        raise ConnectFailed(
            f"{address}: the host name {address.host!r} can't be resolved: {why(error, _WORDS)}"
        ) from error
