"""A channel for a library that has ``send_all``, and perhaps a ``receive`` of whole messages.

After a cancelled ``send_all`` nobody knows what was sent, so the engine, which cancels a call every few
milliseconds, must never be inside of one. A task of the channel's own is: the *pump*. It sends one piece at a
time, and the next one waits, copied already, so that there is no gap between them::

    send_some ->  one piece that waits  ->  pump: await send_all(piece)
    receive_some <- one message that waits <- pump: await receive()

A piece is accepted when the pump has taken it, which means that the ``send_all`` of all before it has
returned and its own has begun. A sender that is cancelled before takes its piece back. So a last word such as
"go" has left this side's queue when it counts as accepted.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial

import trio

from kvmmig.transport.contract import Channel, ReceiveChannel, SendChannel
from kvmmig.transport.toolkit.buffers import prefix
from kvmmig.transport.toolkit.line import Call, Line, failure_of, running
from kvmmig.transport.toolkit.one_at_a_time import OneAtATime

SendAll = Callable[[bytes], Awaitable[object]]
Receive = Callable[[], Awaitable[bytes | bytearray | memoryview]]

_CALL_SIZE = 1 << 20
_MOST_BYTES = 1 << 20  # of a message, copied by one call of receive_some


@asynccontextmanager
async def pumped_channel(
    send_all: SendAll,
    receive: Receive,
    *,
    peer: str,
    ends: tuple[type[BaseException], ...] = (),
    flush: Call | None = None,
    close: Call | None = None,
    abort: Callable[[], object] | None = None,
    call_size: int = _CALL_SIZE,
) -> AsyncIterator[Channel]:
    """Both directions. Its tasks live in the block, whose end ends the channel: in order, or by an abort.

    ``send_all`` sends all that it is given (at most ``call_size`` bytes, a copy). ``receive`` returns the
    next message; an empty one is the end of the stream, and so is an exception of one of the classes
    ``ends``. ``flush`` returns when the library holds nothing back; ``close`` ends its connection in order.
    ``abort`` ends it at once; without it ``close`` is called in a cancelled scope and must then not wait, as
    trio's own ``aclose`` does not.

    Whatever these raise becomes the `ChannelBroken` of every later call, with its cause; a `TransportError`
    stays what it is. After an error of ``send_all`` one can still receive: the other side may have said why.
    The calls run one after the other in one task for each direction, and are cancelled by nothing but the end
    of the channel.
    """
    line = Line(peer, close, abort)
    sender = _PumpedSender(line, send_all, flush, call_size)
    receiver = _PumpedReceiver(line, receive, ends)
    async with running(line, sender.pump, receiver.pump), _BothWays(sender, receiver) as channel:
        yield channel


@asynccontextmanager
async def pumped_sender(
    send_all: SendAll,
    *,
    peer: str,
    flush: Call | None = None,
    close: Call | None = None,
    abort: Callable[[], object] | None = None,
    call_size: int = _CALL_SIZE,
) -> AsyncIterator[SendChannel]:
    """As `pumped_channel`, where there is no way back."""
    line = Line(peer, close, abort)
    sender = _PumpedSender(line, send_all, flush, call_size)
    async with running(line, sender.pump), sender:
        yield sender


@asynccontextmanager
async def pumped_receiver(
    receive: Receive,
    *,
    peer: str,
    ends: tuple[type[BaseException], ...] = (),
    close: Call | None = None,
    abort: Callable[[], object] | None = None,
) -> AsyncIterator[ReceiveChannel]:
    """As `pumped_channel`, where there is only the way back."""
    line = Line(peer, close, abort)
    receiver = _PumpedReceiver(line, receive, ends)
    async with running(line, receiver.pump), receiver:
        yield receiver


class _PumpedSender(SendChannel):
    copies = True

    def __init__(self, line: Line, send_all: SendAll, flush: Call | None, call_size: int) -> None:
        self.peer = line.peer
        self.call_size = call_size
        self._failure: BaseException | None = None
        self._deaf: BaseException | None = None  # what `receive` has raised
        self._line = line
        self._send_all = send_all
        self._flush = flush
        self._sending = OneAtATime("sending")
        self._next: Call | None = None  # waits for the pump
        self._busy = False  # the pump is inside of a call
        self._unflushed = False

    async def pump(self) -> None:
        changed = self._line.changed
        while self._failure is None:
            while self._next is None:
                await changed.park()
            call, self._next, self._busy = self._next, None, True
            changed.unpark_all()
            self._failure = await failure_of(call)
            self._busy = False
            changed.unpark_all()

    async def send_some(self, buffers: Sequence[memoryview]) -> int:
        with self._sending:
            await trio.lowlevel.checkpoint()
            self._check()
            piece = b"".join(prefix(buffers, self.call_size))
            await self._taken(partial(self._send_all, piece))
            self._unflushed = True
            return len(piece)

    async def flush(self) -> None:
        with self._sending:
            await trio.lowlevel.checkpoint()
            self._check()
            await self._done(self._flush)
            self._unflushed = False

    async def aclose(self) -> None:
        if self._line.closed:
            await trio.lowlevel.checkpoint()
            return
        try:
            with self._sending:
                await trio.lowlevel.checkpoint()
                if self._unflushed:
                    self._check()
                    await self._done(self._flush)
                self._deaf = None  # nothing is lost by it any more
                self._check()
                self._line.receiving.cancel()  # it would take the close for an error
                await self._done(self._line.close)
                self._line.end()
        finally:
            self._line.abort()

    def abort(self) -> None:
        self._line.abort()

    def fail(self, failure: BaseException) -> None:
        self._deaf = failure
        self._line.changed.unpark_all()

    def _check(self) -> None:
        self._line.check(self._failure or self._deaf)

    async def _taken(self, call: Call) -> None:
        """Return when the pump has taken it. A cancel takes it back."""
        self._next = call
        self._line.changed.unpark_all()
        try:
            while True:
                await self._line.changed.park()
                if self._next is not call:
                    return
                self._check()
        except trio.Cancelled:
            if self._next is call:
                raise
            # The pump took it in the very turn of the cancel, which the next checkpoint will raise again.
        finally:
            if self._next is call:
                self._next = None

    async def _done(self, call: Call | None) -> None:
        """Return when the pump has done ``call``, and all before it. A cancel leaves it to the pump."""
        if call is not None:
            await self._taken(call)
        while self._busy:
            await self._line.changed.park()
            self._check()
        self._check()


class _PumpedReceiver(ReceiveChannel):
    def __init__(self, line: Line, receive: Receive, ends: tuple[type[BaseException], ...]) -> None:
        self.peer = line.peer
        #: Called with what `receive` has raised.
        self.on_failure: Callable[[BaseException], None] = lambda failure: None
        self._line = line
        self._receive = receive
        self._ends = ends
        self._receiving = OneAtATime("receiving")
        self._held = memoryview(b"")
        self._ended = False
        self._failure: BaseException | None = None

    async def pump(self) -> None:
        with self._line.receiving:
            while not self._ended and self._failure is None:
                self._failure = await failure_of(self._next)
                self._line.changed.unpark_all()
        if self._failure is not None:
            self.on_failure(self._failure)

    async def _next(self) -> None:
        try:
            message = memoryview(await self._receive()).cast("B")
        except self._ends:
            message = memoryview(b"")
        while self._held:
            await self._line.changed.park()
        self._held = message
        self._ended = not message

    async def receive_some(self, buffer: memoryview) -> int:
        with self._receiving:
            await trio.lowlevel.checkpoint()
            self._line.check(None)
            while not self._held:
                self._line.check(self._failure)
                if self._ended:
                    return 0
                await self._line.changed.park()
                self._line.check(None)
            # Nothing from here on waits, so a cancel can only come while nothing has been taken.
            count = min(len(buffer), len(self._held), _MOST_BYTES)
            buffer[:count] = self._held[:count]
            self._held = self._held[count:]
            if not self._held:
                self._line.changed.unpark_all()
            return count

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()
        try:
            if not self._line.closed and self._line.close is not None:
                self._line.receiving.cancel()
                self._line.check(await failure_of(self._line.close))
                self._line.end()
        finally:
            self._line.abort()

    def abort(self) -> None:
        self._line.abort()


class _BothWays(Channel):
    """The two directions of one line."""

    copies = True

    def __init__(self, sender: _PumpedSender, receiver: _PumpedReceiver) -> None:
        self.peer = sender.peer
        self.call_size = sender.call_size
        self._sender = sender
        self._receiver = receiver
        receiver.on_failure = sender.fail

    async def send_some(self, buffers: Sequence[memoryview]) -> int:
        return await self._sender.send_some(buffers)

    async def flush(self) -> None:
        await self._sender.flush()

    async def receive_some(self, buffer: memoryview) -> int:
        return await self._receiver.receive_some(buffer)

    async def aclose(self) -> None:
        await self._sender.aclose()

    def abort(self) -> None:
        self._sender.abort()
