"""``tcp:HOST:PORT``: a TCP connection, the transport of a live migration.

What is added to any stream socket's channel is a `flush` that means the other side's kernel, and an abort
that the other side can't take for an end.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
import struct
import termios
from typing import Any

import trio

from kvmmig.transport.toolkit import tcpsockets
from kvmmig.errors import BadURI, ConnectFailed
from kvmmig.transport import Channel, Listener, Transport, TransportURI
from kvmmig.transport.toolkit.sockets import WORDS, SocketChannel, SocketListener
from kvmmig.transport.toolkit.words import why

_TARGET = re.compile(r"(?:\[(?P<v6>[0-9A-Fa-f:.]+(?:%[^\]]+)?)\]|(?P<host>[^:\[\]]+)):(?P<port>[0-9]{1,5})")
_LINGER_ZERO = struct.pack("ii", 1, 0)
_BACKLOG = 128
_TCP_CLOSE = 7  # <linux/tcp_states.h>: the connection is over, by a reset or by a timeout

# A side that is only waiting notices a peer whose host has vanished after about a minute.
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3))

_WORDS = {
    **WORDS,
    errno.ETIMEDOUT: "the other side does not answer",
    errno.EHOSTUNREACH: "there is no route to that host",
    errno.ENETUNREACH: "there is no route to that network",
    errno.EADDRINUSE: "another process listens there already; choose another port, or 0 for any",
    errno.EADDRNOTAVAIL: "that address is not one of this host's",
    errno.EACCES: "a port below 1024 needs root; choose a higher one",
}


class TcpTransport(Transport):
    """Connects to, or listens on, one TCP address."""

    summary = "a TCP connection to a kvmmig that waits there"
    syntax = "tcp:HOST:PORT"

    def __init__(self, uri: TransportURI) -> None:
        super().__init__(uri)
        match = _TARGET.fullmatch(uri.target)
        if match is None or int(match["port"]) > 65535:
            raise BadURI(
                f"{str(uri)!r} is not a TCP address: write tcp:HOST:PORT with a port up to 65535, and an "
                "IPv6 address in brackets, such as tcp:127.0.0.1:4444 or tcp:[::1]:4444"
            )
        self._host: str = match["v6"] or match["host"]
        self._port = int(match["port"])

    async def connect(self) -> Channel:
        """Try each address that the host name stands for, in order, and say of the last why it failed."""
        if self._port == 0:
            raise ConnectFailed(f"can't connect to {self.uri}: port 0 is only for listening on any free port")
        addresses = await self._resolve()
        try:
            return TcpChannel(await tcpsockets.connect(addresses))
        except OSError as error:
            raise ConnectFailed(f"can't connect to {self.uri}: {why(error, _WORDS)}") from error

    async def listen(self) -> Listener:
        """Listen on the first address that the host name stands for; port 0 takes any free port."""
        addresses = await self._resolve()
        try:
            sock = await tcpsockets.listen(addresses, _BACKLOG)
        except OSError as error:
            raise ConnectFailed(f"can't listen on {self.uri}: {why(error, _WORDS)}") from error
        return SocketListener(sock, f"tcp:{_address(sock.getsockname())}", TcpChannel, _WORDS)

    async def _resolve(self) -> list[tcpsockets.SocketAddress]:
        try:
            return await tcpsockets.resolve(self._host, self._port)
        except (OSError, UnicodeError) as error:
            raise ConnectFailed(
                f"{self.uri}: the host name {self._host!r} can't be resolved: {why(error, _WORDS)}"
            ) from error


class TcpChannel(SocketChannel):
    """One connection. Takes over ``sock``, which must be connected.

    The size of the send buffer is left to the kernel: its own tuning reaches the maximum within a few
    round trips, and setting it by hand would cap it at ``net.core.wmem_max``, 208 KiB on most hosts.
    """

    def __init__(self, sock: trio.socket.SocketType) -> None:
        super().__init__(sock, _address(sock.getpeername()), _WORDS)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # a "go" must not wait for an ACK
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)

    async def flush(self) -> None:
        """Return when the other side's kernel has acknowledged everything.

        The kernel has no event for that, so it is asked again and again, after 0.1 ms at first and 10 ms
        at most.
        """
        await trio.lowlevel.checkpoint()
        pause = 0.0001
        while True:
            with self._translated():
                # A reset drops the queue, so the connection's state is asked after the queue's length.
                waiting = struct.unpack("i", fcntl.ioctl(self._socket, termios.TIOCOUTQ, bytes(4)))[0]
                self._check_alive()
            if waiting == 0:
                self._unflushed = False
                return
            await trio.sleep(pause)
            pause = min(pause * 2, 0.01)

    def abort(self) -> None:
        """Reset the connection: the other side sees an error, never an end."""
        if not self._closed:
            try:
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_ZERO)
            finally:
                super().abort()

    def _check_alive(self) -> None:
        number = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        state = self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
        if not number and state == _TCP_CLOSE:
            number = errno.ECONNRESET
        if number:
            raise OSError(number, os.strerror(number))


def _address(name: tuple[Any, ...]) -> str:
    host, port = name[0], name[1]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
