"""Where a monitor listens: ``unix:PATH`` or ``tcp:HOST:PORT``, as QEMU's ``-qmp`` writes it.

A Unix socket's file is private to its user from the moment it exists, and takes the place only of one that
a dead monitor has left behind. TCP has no such guard, so without a host it is this machine's loopback
address.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import re
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio

from kvmmig.errors import BadURI, ConnectFailed
from kvmmig.transport.toolkit import TCP_WORDS, tcpsockets, unixsockets, why
from kvmmig.units import PORT

_LONGEST_PATH = 107  # bytes: sun_path of <sys/un.h> without its final zero
_LOOPBACK = "127.0.0.1"
_TCP = re.compile(r"(?:\[(?P<v6>[0-9A-Fa-f:.]+(?:%[^\]]+)?)\]|(?P<host>[^:\[\]]*)):(?P<port>[0-9]{1,5})")
_HOW = "write unix:PATH, such as unix:/tmp/a.sock, or tcp:HOST:PORT, such as tcp:127.0.0.1:4444"
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
class UnixAddress:
    """A socket file."""

    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"


@dataclass(frozen=True)
class TcpAddress:
    """A host, by name or number, and a port; port 0 listens on any free one."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"tcp:[{self.host}]:{self.port}" if ":" in self.host else f"tcp:{self.host}:{self.port}"


Address = UnixAddress | TcpAddress


@dataclass(frozen=True)
class Listening:
    """A socket that listens. ``private``: nobody else's processes and no other host can reach it unasked."""

    socket: trio.socket.SocketType
    address: Address
    private: bool


def parse_address(text: str) -> Address:
    """Raises `BadURI`."""
    kind, colon, rest = text.partition(":")
    if kind == "unix" and colon:
        if not rest or "\0" in rest:
            raise BadURI(f"{text!r} names no socket: {_HOW}")
        if (length := len(os.fsencode(rest))) > _LONGEST_PATH:
            raise BadURI(
                f"{text!r}: the path has {length} bytes, and a socket's may have {_LONGEST_PATH}; "
                "choose a shorter one"
            )
        return UnixAddress(rest)
    match = _TCP.fullmatch(rest)
    if kind != "tcp" or match is None or int(match["port"]) not in PORT:
        raise BadURI(f"{text!r} is not a monitor's address: {_HOW}")
    return TcpAddress(match["v6"] or match["host"] or _LOOPBACK, int(match["port"]))


@asynccontextmanager
async def open_listener(address: Address) -> AsyncIterator[Listening]:
    """Listen as long as the block lasts. Raises `ConnectFailed`.

    A socket file is removed at the end, unless another has taken its name meanwhile.
    """
    if isinstance(address, UnixAddress):
        # A thread, because looking up a path may wait for a disk.
        bound, file = await trio.to_thread.run_sync(_bind_unix, address)
        listening = Listening(trio.socket.from_stdlib_socket(bound), address, private=True)
    else:
        listening, file = await _listen_tcp(address), None
    try:
        yield listening
    finally:
        if file is not None:
            file.remove()
        listening.socket.close()


async def connect(address: Address) -> trio.socket.SocketType:
    """Connect, and wait where the listener's queue is full. Raises `ConnectFailed`."""
    if isinstance(address, UnixAddress):
        return await _connect_unix(address)
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
    addresses = await _resolve(address)
    try:
        sock = await tcpsockets.listen(addresses, _BACKLOG)
    except OSError as error:
        raise ConnectFailed(f"can't listen on {address}: {why(error, _WORDS)}") from error
    host, port = sock.getsockname()[:2]
    return Listening(sock, TcpAddress(host, port), ipaddress.ip_address(host.partition("%")[0]).is_loopback)


async def _resolve(address: TcpAddress) -> list[tcpsockets.SocketAddress]:
    try:
        return await tcpsockets.resolve(address.host, address.port)
    except (OSError, UnicodeError) as error:
        raise ConnectFailed(
            f"{address}: the host name {address.host!r} can't be resolved: {why(error, _WORDS)}"
        ) from error
