"""Stream sockets: what ``tcp:``, ``unix:`` and ``fd:`` have in common.

A socket's own promise is the contract's: a non-blocking ``sendmsg`` accepts a prefix or nothing, and trio
makes each call a checkpoint. So go small messages. Bulk is copied by lanes, one for each direction, which are
made when they are first needed. What is added are errors that name the other side.
"""

from __future__ import annotations

import errno
import fcntl
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress

import trio

from kvmmig.errors import ChannelBroken, ChannelClosed, ConnectFailed
from kvmmig.transport.contract import Channel, Listener
from kvmmig.transport.peers import peer_of
from kvmmig.transport.toolkit.lanes import Head, ReceiveLane, SendLane
from kvmmig.transport.toolkit.one_at_a_time import OneAtATime
from kvmmig.transport.toolkit.words import why
from kvmmig.transport.uri import TransportURI

# As much is worth a lane: less is copied by the event loop in some 10 us, and a way into a thread takes 50.
_BULK = 1 << 16
# As much as the kernel itself lets wait in a TCP socket (net.ipv4.tcp_wmem).
_FIRST = 4 << 20
_MOST_BUFFERS = 1024  # IOV_MAX

#: What errors of every kind of stream socket mean, by their number; for `why`.
SOCKET_WORDS: Mapping[int, str] = {
    errno.ECONNREFUSED: "nobody listens there; start the other side first",
    errno.ECONNRESET: "the other side cut the connection",
    errno.EPIPE: "the other side has closed the connection",
}


class SocketChannel(Channel):
    """One connection. Takes over ``sock``, which must be connected.

    Here the other side's kernel is this one, as for a Unix socket: what the kernel has is there.
    """

    call_size = 16 << 20

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
        self._send_lane: SendLane | None = None
        self._receive_lane: ReceiveLane | None = None

    async def send_some(self, buffers: Sequence[memoryview]) -> int:
        with self._sending, self._translated():
            lane = self._send_lane
            if (lane is None or lane.idle) and sum(len(buffer) for buffer in buffers[:_MOST_BUFFERS]) < _BULK:
                sent = await self._socket.sendmsg(buffers[:_MOST_BUFFERS])
            else:
                sent = await self._lane().send_some(buffers)
            self._unflushed = True
            return sent

    async def send_chunk(self, buffers: Sequence[memoryview], most: int, head: Head) -> int:
        """As `send_some`: at most ``most`` bytes, behind what ``head`` makes of their number."""
        with self._sending, self._translated():
            self._unflushed = True
            return await self._lane().send_some(buffers, most, head)

    def send_chunk_at_once(self, buffers: Sequence[memoryview], most: int, head: Head) -> int:
        """As `send_chunk`, but 0 where there is no room; it does not wait."""
        with self._sending, self._translated():
            self._unflushed = True
            return self._lane().send_at_once(buffers, most, head)

    async def receive_some(self, buffer: memoryview) -> int:
        with self._receiving, self._translated():
            if len(buffer) < _BULK:
                return await self._socket.recv_into(buffer)
            if self._receive_lane is None:
                self._receive_lane = ReceiveLane(self._another_descriptor(), self.peer)
            return await self._receive_lane.receive_some(buffer)

    async def flush(self) -> None:
        with self._translated():
            await trio.lowlevel.checkpoint()
            if self._send_lane is not None:
                await self._send_lane.wait_idle()

    def abort(self) -> None:
        """The connection ends with its last descriptor: a millisecond later, where a lane is busy copying."""
        self._closed = True
        for lane in (self._send_lane, self._receive_lane):
            if lane is not None:
                lane.abort()
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
        for lane in (self._send_lane, self._receive_lane):
            if lane is not None:
                await lane.end()

    def _lane(self) -> SendLane:
        if self._send_lane is None:
            self._send_lane = SendLane(self._another_descriptor(), self.peer, first=_FIRST)
        return self._send_lane

    def _another_descriptor(self) -> int:
        return fcntl.fcntl(self._socket.fileno(), fcntl.F_DUPFD_CLOEXEC, 0)

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
        async with await self.accept_one() as channel:
            yield channel

    def close(self) -> None:
        """Stop listening. Idempotent."""
        self._closed = True
        self._socket.close()

    async def accept_one(self) -> Channel:
        """As `accept`; the caller ends the channel."""
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
