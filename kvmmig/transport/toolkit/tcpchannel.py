"""A TCP connection as a channel: a `flush` that means the other side's kernel, and an abort that resets."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
import termios
from collections.abc import Mapping
from typing import Any

import trio

from kvmmig.transport.toolkit import tcpsockets
from kvmmig.transport.toolkit.sockets import SOCKET_WORDS, SocketChannel

_LINGER_ZERO = struct.pack("ii", 1, 0)
_TCP_CLOSE = 7  # <linux/tcp_states.h>: the connection is over, by a reset or by a timeout

#: What a TCP socket's errors mean, by their number; for `why`.
TCP_WORDS: Mapping[int, str] = {
    **SOCKET_WORDS,
    errno.ETIMEDOUT: "the other side does not answer",
    errno.EHOSTUNREACH: "there is no route to that host",
    errno.ENETUNREACH: "there is no route to that network",
    errno.EADDRINUSE: "another process listens there already; choose another port, or 0 for any",
    errno.EADDRNOTAVAIL: "that address is not one of this host's",
    errno.EACCES: "a port below 1024 needs root; choose a higher one",
}


def address(name: tuple[Any, ...]) -> str:
    """A TCP socket's name as one writes it: ``127.0.0.1:4444``, ``[::1]:4444``."""
    host, port = name[0], name[1]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class TcpChannel(SocketChannel):
    """One connection. Takes over ``sock``, which must be connected.

    The size of the send buffer is left to the kernel: its own tuning reaches the maximum within a few
    round trips, and setting it by hand would cap it at ``net.core.wmem_max``, 208 KiB on most hosts.
    """

    def __init__(self, sock: trio.socket.SocketType) -> None:
        """Raises `OSError` for a connection that is over already; ``sock`` is still the caller's then."""
        super().__init__(sock, address(sock.getpeername()), TCP_WORDS)
        tcpsockets.tune(sock)  # above all, a "go" must not wait for an ACK

    async def flush(self) -> None:
        """Return when the other side's kernel has acknowledged everything.

        The kernel has no event for that, so it is asked again and again, after 0.1 ms at first and 10 ms
        at most.
        """
        await super().flush()
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
