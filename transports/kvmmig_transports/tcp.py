"""``tcp:HOST:PORT``: a TCP connection, the transport of a live migration.

The socket's own promise is the contract's: a non-blocking ``sendmsg`` accepts a prefix or nothing, and trio
makes each call a checkpoint. What is added is a bound on one call, a `flush` that means the other side's
kernel, and errors that name the address.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
import struct
import termios
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import trio

from kvmmig.errors import BadURI, ChannelBroken, ChannelClosed, ConnectFailed
from kvmmig.migration.transport import (
    Channel,
    ChannelFeatures,
    Listener,
    OneAtATime,
    Transport,
    TransportURI,
)
from kvmmig_transports._buffers import prefix

# One call copies at most this much, so that it holds the event loop for 0.2 ms at the 5 GB/s of a good
# loopback connection and for 1 ms at 1 GB/s. A quarter of it cost up to a third of the throughput.
_MOST_BYTES = 1 << 20

_TARGET = re.compile(r"(?:\[(?P<v6>[0-9A-Fa-f:.]+(?:%[^\]]+)?)\]|(?P<host>[^:\[\]]+)):(?P<port>[0-9]{1,5})")
_LINGER_ZERO = struct.pack("ii", 1, 0)
_TCP_CLOSE = 7  # <linux/tcp_states.h>: the connection is over, by a reset or by a timeout

# A side that is only waiting notices a peer whose host has vanished after about a minute.
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3))

_WORDS = {
    errno.ECONNREFUSED: "nobody listens there; start the other side first",
    errno.ECONNRESET: "the other side cut the connection",
    errno.EPIPE: "the other side has closed the connection",
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
        failure: OSError | None = None
        for family, address in await self._resolve():
            sock = trio.socket.socket(family, socket.SOCK_STREAM)
            try:
                await sock.connect(address)
                return TcpChannel(sock)
            except BaseException as error:
                sock.close()
                if not isinstance(error, OSError):
                    raise
                failure = error
        assert failure is not None  # a name that stands for no address is an error of _resolve
        raise ConnectFailed(f"can't connect to {self.uri}: {_why(failure)}") from failure

    async def listen(self) -> Listener:
        """Listen on the first address that the host name stands for; port 0 takes any free port."""
        family, address = (await self._resolve())[0]
        sock = trio.socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            await sock.bind(address)
            sock.listen()
            return TcpListener(sock)
        except BaseException as error:
            sock.close()
            if not isinstance(error, OSError):
                raise
            raise ConnectFailed(f"can't listen on {self.uri}: {_why(error)}") from error

    async def _resolve(self) -> list[tuple[socket.AddressFamily, tuple[Any, ...]]]:
        try:
            found = await trio.socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise ConnectFailed(
                f"{self.uri}: the host name {self._host!r} can't be resolved: {_why(error)}"
            ) from error
        return [(family, address) for family, _, _, _, address in found]


class TcpListener(Listener):
    """A listening socket. Every `accept` takes one connection; the socket goes on listening."""

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self._socket = sock
        self._closed = False
        self.uri = f"tcp:{_address(sock.getsockname())}"

    async def accept(self) -> Channel:
        """Skips a source that has gone away again while it waited: the next one may be well."""
        while True:
            try:
                sock, _ = await self._socket.accept()
            except (OSError, trio.ClosedResourceError) as error:
                if self._closed or not isinstance(error, OSError):
                    raise ConnectFailed(f"{self.uri} is not listened on any more") from error
                if error.errno == errno.ECONNABORTED:
                    continue
                raise ConnectFailed(f"can't accept a connection on {self.uri}: {_why(error)}") from error
            try:
                return TcpChannel(sock)
            except OSError:
                sock.close()

    async def aclose(self) -> None:
        self._closed = True
        self._socket.close()
        await trio.lowlevel.checkpoint()


class TcpChannel(Channel):
    """One connection. Takes over ``sock``, which must be connected.

    The size of the send buffer is left to the kernel: its own tuning reaches the maximum within a few
    round trips, and setting it by hand would cap it at ``net.core.wmem_max``, 208 KiB on most hosts.
    """

    features = ChannelFeatures(two_way=True)

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self.peer = _address(sock.getpeername())
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # a "go" must not wait for an ACK
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
        self._socket = sock
        self._sending = OneAtATime("sending")
        self._receiving = OneAtATime("receiving")
        self._closed = False
        self._broken: OSError | None = None
        self._unflushed = False

    async def send_some(self, buffers: Sequence[memoryview]) -> int:
        with self._sending, self._translated():
            sent = await self._socket.sendmsg(prefix(buffers, _MOST_BYTES))
            self._unflushed = True
            return sent

    async def receive_some(self, buffer: memoryview) -> int:
        with self._receiving, self._translated():
            return await self._socket.recv_into(buffer[:_MOST_BYTES])

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
            self._closed = True
            try:
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_ZERO)
            finally:
                self._socket.close()

    async def aclose(self) -> None:
        """Flush what was sent since the last `flush`, end the stream, close."""
        if self._closed:
            await trio.lowlevel.checkpoint()
            return
        try:
            if self._unflushed:
                await self.flush()
            else:
                await trio.lowlevel.checkpoint()
        except BaseException:
            self.abort()
            raise
        self._closed = True
        self._socket.close()

    def _check_alive(self) -> None:
        number = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        state = self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
        if not number and state == _TCP_CLOSE:
            number = errno.ECONNRESET
        if number:
            raise OSError(number, os.strerror(number))

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """The one place where this channel's operating-system errors become sentences."""
        if self._closed:
            raise ChannelClosed(f"the connection to {self.peer} was closed by this side")
        if self._broken:
            raise self._sentence(self._broken)
        try:
            yield
        except (OSError, trio.ClosedResourceError) as error:
            if self._closed or not isinstance(error, OSError):
                raise ChannelClosed(f"the connection to {self.peer} was closed by this side") from error
            # Kept, because the kernel tells a reset only once and reports an orderly end from then on.
            self._broken = error
            raise self._sentence(error) from error

    def _sentence(self, error: OSError) -> ChannelBroken:
        broken = ChannelBroken(f"the connection to {self.peer} is broken: {_why(error)}")
        broken.__cause__ = error
        return broken


def _address(name: tuple[Any, ...]) -> str:
    host, port = name[0], name[1]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _why(error: OSError | UnicodeError) -> str:
    if isinstance(error, OSError):
        return _WORDS.get(error.errno or 0) or error.strerror or str(error)
    return str(error)
