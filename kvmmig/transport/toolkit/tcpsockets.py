"""TCP sockets by a host's name, which may stand for several addresses."""

from __future__ import annotations

import socket
from typing import Any

import trio

SocketAddress = tuple[socket.AddressFamily, tuple[Any, ...]]


async def resolve(host: str, port: int) -> list[SocketAddress]:
    """What a name stands for, at least one address. Raises `OSError` or `UnicodeError`."""
    found = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
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
