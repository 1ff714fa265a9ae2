"""``tcp:HOST:PORT``: a TCP connection, the transport of a live migration."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing

from kvmmig.errors import BadURI, ConnectFailed
from kvmmig.transport import Channel, Listener, Transport, TransportURI
from kvmmig.transport.toolkit import (
    TCP_WORDS,
    FarEnd,
    Lanes,
    SocketListener,
    TcpChannel,
    address,
    tcpsockets,
    why,
)
from kvmmig.units import PORT

_TARGET = re.compile(r"(?:\[(?P<v6>[0-9A-Fa-f:.]+(?:%[^\]]+)?)\]|(?P<host>[^:/\[\]]+)):(?P<port>[0-9]{1,5})")
_BACKLOG = 128


class TcpTransport(Transport):
    """Connects to, or listens on, one TCP address."""

    summary = "a TCP connection to a kvmmig that waits there"
    syntax = "tcp:HOST:PORT[?lanes=N&user=USER]"
    options = (Lanes.option, FarEnd.option)

    def __init__(self, uri: TransportURI) -> None:
        super().__init__(uri)
        match = _TARGET.fullmatch(uri.target)
        if match is None and uri.target.startswith("//"):
            raise BadURI(
                f"{str(uri)!r} has // in it, which no transport has: write tcp:{uri.target.strip('/')}"
            )
        if match is None or int(match["port"]) not in PORT:
            raise BadURI(
                f"{str(uri)!r} is not a TCP address: write tcp:HOST:PORT with a port up to 65535, and an "
                "IPv6 address in brackets, such as tcp:127.0.0.1:4444 or tcp:[::1]:4444"
            )
        self._host: str = match["v6"] or match["host"]
        self._port = int(match["port"])
        self._far_end = FarEnd(uri, self.option("user"))
        self._lanes = Lanes(uri, self.option("lanes"))

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Channel]:
        """Try each address that the host name stands for, in order, and say of the last why it failed."""
        if self._port == 0:
            raise ConnectFailed(f"can't connect to {self.uri}: port 0 is only for listening on any free port")
        addresses = await self._resolve()
        async with self._lanes.connect(lambda: self._connected(addresses)) as channel:
            yield channel

    @asynccontextmanager
    async def listen(self) -> AsyncIterator[Listener]:
        """Listen on the first address that the host name stands for; port 0 takes any free port."""
        self._far_end.check_listening()
        addresses = await self._resolve()
        try:
            sock = await tcpsockets.listen(addresses, _BACKLOG)
        except OSError as error:
            raise ConnectFailed(f"can't listen on {self.uri}: {why(error, TCP_WORDS)}") from error
        uri = TransportURI("tcp", address(sock.getsockname()))
        with closing(self._lanes.listener(SocketListener(sock, uri, TcpChannel, TCP_WORDS))) as listener:
            yield listener

    @asynccontextmanager
    async def _connected(self, addresses: list[tcpsockets.SocketAddress]) -> AsyncIterator[TcpChannel]:
        try:
            sock = await tcpsockets.connect(addresses)
            try:
                connection = TcpChannel(sock)
            except OSError:
                sock.close()
                raise
        except OSError as error:
            raise ConnectFailed(f"can't connect to {self.uri}: {why(error, TCP_WORDS)}") from error
        async with connection as channel:
            self._far_end.check(channel)
            yield channel

    async def _resolve(self) -> list[tcpsockets.SocketAddress]:
        try:
            return await tcpsockets.resolve(self._host, self._port)
        except (OSError, UnicodeError) as error:
            raise ConnectFailed(
                f"{self.uri}: the host name {self._host!r} can't be resolved: {why(error, TCP_WORDS)}"
            ) from error
