"""TCP sockets by a host's name, which may stand for several addresses."""

from __future__ import annotations

import socket
from typing import Any

import trio

# A side that is only waiting notices a peer whose host has vanished after about a minute.
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3))

SocketAddress = tuple[socket.AddressFamily, tuple[Any, ...]]


async def resolve(host: str, port: int) -> list[SocketAddress]:
    """What a name stands for, at least one address. Raises `OSError` or `UnicodeError`."""
    # Bytes go as they are; for text the codec of international names is loaded first, which takes 10 ms.
    name = host.encode() if host.isascii() and host.isprintable() else host
    found = await trio.socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
    return [(family, address) for family, _, _, _, address in found]


async def connect(addresses: list[SocketAddress]) -> trio.socket.SocketType:
    """A connection to the first that answers. Raises the last one's `OSError`; a cancel leaves nothing."""
    failure = OSError("it stands for no address")
    for family, address in addresses:
        sock = trio.socket.socket(family, socket.SOCK_STREAM)
        try:
            await sock.connect(address)
            return sock
        except BaseException as error:
            sock.close()
            if not isinstance(error, OSError):
                raise
            failure = error
    raise failure


async def listen(addresses: list[SocketAddress], backlog: int) -> trio.socket.SocketType:
    """A socket that listens on the first of them. Raises `OSError`."""
    family, address = addresses[0]
    sock = trio.socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        await sock.bind(address)
        sock.listen(backlog)
        return sock
    except BaseException:
        sock.close()
        raise


def tune(sock: trio.socket.SocketType) -> None:
    """Set up a connection: small messages go at once, and a vanished host is noticed after about a minute.

    Raises `OSError` for one that is over already.
    """
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE:
        sock.setsockopt(socket.IPPROTO_TCP, option, value)
