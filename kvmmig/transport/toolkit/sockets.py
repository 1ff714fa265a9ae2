"""Stream sockets: what ``tcp:``, ``unix:`` and ``fd:`` have in common.

A socket's own promise is the contract's: a non-blocking ``sendmsg`` accepts a prefix or nothing, and trio
makes each call a checkpoint. What is added is a bound on one call, and errors that name the other side.
"""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress

import trio

from kvmmig.errors import ChannelBroken, ChannelClosed, ConnectFailed
from kvmmig.transport.contract import Channel, Listener
from kvmmig.transport.peers import peer_of
from kvmmig.transport.toolkit.buffers import prefix
from kvmmig.transport.toolkit.one_at_a_time import OneAtATime
from kvmmig.transport.toolkit.words import why
from kvmmig.transport.uri import TransportURI

# One call copies at most this much, so that it holds the event loop for 0.1 ms at the 5 GB/s of a good
# loopback connection and for 0.5 ms at 1 GB/s. Half of it cost up to a third of the throughput.
_MOST_BYTES = 1 << 19

#: What errors of every kind of stream socket mean, by their number; for `why`.
SOCKET_WORDS: Mapping[int, str] = {
    errno.ECONNREFUSED: "nobody listens there; start the other side first",
    errno.ECONNRESET: "the other side cut the connection",
    errno.EPIPE: "the other side has closed the connection",
}


class SocketChannel(Channel):
    """One connection. Takes over ``sock``, which must be connected. The kernel copies what it accepts.

    Here the other side's kernel is this one, as for a Unix socket: what was accepted is there.
    """

    copies = True
    call_size = _MOST_BYTES

    def __init__(
        self, sock: trio.socket.SocketType, peer: str, words: Mapping[int, str] = SOCKET_WORDS
    ) -> None:
        """``words`` say what an error's number means."""
        self.peer = peer
        with suppress(OSError):  # it has gone already, or is of a family that knows no users
            self.identity = peer_of(sock)
        self._socket = sock
        self._words = words
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
        with self._translated():
            await trio.lowlevel.checkpoint()

    def abort(self) -> None:
        self._closed = True
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
        broken = ChannelBroken(f"the connection to {self.peer} is broken: {why(error, self._words)}")
        broken.__cause__ = error
        return broken


class SocketListener(Listener):
    """A listening socket. Every `accept` takes one connection; the socket goes on listening until `close`."""

    def __init__(
        self,
        sock: trio.socket.SocketType,
        uri: TransportURI,
        channel: Callable[[trio.socket.SocketType], Channel],
        words: Mapping[int, str] = SOCKET_WORDS,
    ) -> None:
        """Takes over ``sock``. ``channel`` makes a channel of a connection; it may raise `OSError`."""
        self.uri = uri
        self._socket = sock
        self._channel = channel
        self._words = words
        self._closed = False

    @asynccontextmanager
    async def accept(self) -> AsyncIterator[Channel]:
        """Skips a source that has gone away again while it waited: the next one may be well."""
        async with await self._next() as channel:
            yield channel

    def close(self) -> None:
        """Stop listening. Idempotent."""
        self._closed = True
        self._socket.close()

    async def _next(self) -> Channel:
        while True:
            try:
                sock, _ = await self._socket.accept()
            except (OSError, trio.ClosedResourceError) as error:
                if self._closed or not isinstance(error, OSError):
                    raise ConnectFailed(f"{self.uri} is not listened on any more") from error
                if error.errno == errno.ECONNABORTED:
                    continue
                raise ConnectFailed(
                    f"can't accept a connection on {self.uri}: {why(error, self._words)}"
                ) from error
            try:
                return self._channel(sock)
            except OSError:
                sock.close()
