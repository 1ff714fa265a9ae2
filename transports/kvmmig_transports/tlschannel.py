"""An encrypted channel over another one. Four things go on at the same time, in each direction two::

    send_some ->  copies  ->  encrypt, in a thread  ->  on their way  ->  below
    receive_some  <-  decrypt, in a thread  <-  a few buffers  <-  below

What was accepted goes its way without another call. An end of the channel below that the other side has not
announced inside of the encryption (close_notify) is an error: somebody on the way may have cut the stream.
"""

from __future__ import annotations

import ssl
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import TypeVar

import trio

from kvmmig.errors import ChannelBroken, TransportError
from kvmmig.transport import Channel, PassingChannel
from kvmmig.transport.toolkit import own_tasks, pumped_channel
from kvmmig_transports.tlscredentials import sentence
from kvmmig_transports.tlssession import Session

T = TypeVar("T")

_PIECE = 1 << 20
_PIECES = 4  # wait at the most, and are encrypted by one call of a thread: the handing over costs most
_CHUNK = 1 << 18
_CHUNKS = 8
# A record's rest that waits in the session, and what the handshake has read too much, fit too.
_DECRYPTED = _CHUNK * _CHUNKS + (1 << 17)


@asynccontextmanager
async def tls_channel(session: Session, below: Channel) -> AsyncIterator[Channel]:
    """For the block; ``session`` has shaken hands over ``below``, which ends with it."""
    flow = _Flow(session, below)
    async with own_tasks() as nursery:
        nursery.start_soon(flow.seal)
        nursery.start_soon(flow.carry_out)
        nursery.start_soon(flow.carry_in)
        pumped = pumped_channel(
            flow.send_all,
            flow.receive,
            peer=below.peer,
            flush=flow.flush,
            close=flow.close,
            abort=below.abort,
            call_size=_PIECE,
        )
        async with pumped as channel:
            yield _TlsChannel(channel, flow, below)


class _TlsChannel(PassingChannel):
    """``channel``, with what else ``below`` has to say."""

    def __init__(self, channel: Channel, flow: _Flow, below: Channel) -> None:
        super().__init__(channel)
        self.notices = below.notices
        self.knobs = below.knobs
        self._flow = flow
        self._lower = below

    def waits_for(self) -> str:
        return self._flow.waits_for() or self._lower.waits_for()

    def counters(self) -> dict[str, float]:
        return {**self._lower.counters(), **self._flow.counters()}


class _Flow:
    """Each method is called by one task at a time."""

    def __init__(self, session: Session, below: Channel) -> None:
        self._session = session
        self._below = below
        self._changed = trio.lowlevel.ParkingLot()
        self._pieces: list[memoryview] = []  # wait to be encrypted
        self._busy = False  # some are
        self._outgoing: list[memoryview] = []  # encrypted, on their way
        self._broken_out: TransportError | None = None
        self._free = [memoryview(bytearray(_CHUNK)) for _ in range(_CHUNKS)]
        self._chunks: deque[tuple[memoryview, int]] = deque()
        self._broken_in: TransportError | None = None
        self._ended = False
        # One is with whoever reads while the other is filled.
        self._decrypted = deque(memoryview(bytearray(_DECRYPTED)) for _ in range(2))
        self._unread = True  # the session may have more to give before new bytes come
        self._sealing, self._opening = trio.CapacityLimiter(1), trio.CapacityLimiter(1)
        self._sent = self._received = 0  # bytes below

    async def send_all(self, piece: bytes) -> None:
        while len(self._pieces) >= _PIECES and self._broken_out is None:
            await self._changed.park()
        if self._broken_out is not None:
            raise self._broken_out
        self._pieces.append(memoryview(piece))
        self._changed.unpark_all()

    async def flush(self) -> None:
        await self._emptied()
        await self._below.flush()

    async def close(self) -> None:
        """All has been flushed: the other side may be gone already, and need not hear of the end."""
        await self._emptied()
        try:
            self._outgoing = await self._in_thread(self._sealing, self._session.close)
            self._changed.unpark_all()
            await self.flush()
        except TransportError:
            self._below.abort()
        await self._below.aclose()

    async def receive(self) -> memoryview:
        """What has come, decrypted; an empty one at the end that the other side has announced."""
        while not self._session.closed:
            if not self._chunks and not self._unread:
                if self._broken_in is not None:
                    raise self._broken_in
                if self._ended:
                    raise ChannelBroken(
                        f"the stream from {self._below.peer} was cut off: the connection ended, and the "
                        "other side had not said so"
                    )
                await self._changed.park()
                continue
            used = list(self._chunks)
            self._chunks.clear()
            chunks = [chunk[:count] for chunk, count in used]
            out = self._decrypted[0]
            count = await self._in_thread(self._opening, lambda: self._session.open(chunks, out))  # noqa: B023
            self._unread = count == len(out)
            self._free += [chunk for chunk, _ in used]
            self._changed.unpark_all()
            if count:
                self._decrypted.rotate()
                return out[:count]
        return memoryview(b"")

    async def seal(self) -> None:
        while True:
            while not self._pieces:
                await self._changed.park()
            pieces, self._pieces, self._busy = self._pieces, [], True
            self._changed.unpark_all()
            try:
                sealed = await self._in_thread(self._sealing, partial(self._session.seal, pieces))
            except TransportError as error:
                self._fail_out(error)
                return
            while self._outgoing and self._broken_out is None:
                await self._changed.park()
            self._outgoing, self._busy = sealed, False
            self._changed.unpark_all()

    async def carry_out(self) -> None:
        while True:
            while not self._outgoing:
                await self._changed.park()
            try:
                while self._outgoing:
                    count = await self._below.send_some(self._outgoing)
                    self._sent += count
                    self._forget(count)
            except TransportError as error:
                self._fail_out(error)
                return
            self._changed.unpark_all()

    async def carry_in(self) -> None:
        while not self._ended:
            while not self._free:
                await self._changed.park()
            chunk = self._free.pop()
            try:
                count = await self._below.receive_some(chunk)
            except TransportError as error:
                self._broken_in = error
                break
            self._received += count
            self._ended = count == 0
            if count:
                self._chunks.append((chunk, count))
                self._changed.unpark_all()
        self._changed.unpark_all()

    def waits_for(self) -> str:
        return str(self._broken_out or "")

    def counters(self) -> dict[str, float]:
        return {"tls.sent-bytes": self._sent, "tls.received-bytes": self._received}

    def _fail_out(self, error: TransportError) -> None:
        self._broken_out = self._broken_out or error
        self._changed.unpark_all()

    async def _emptied(self) -> None:
        while (self._pieces or self._busy or self._outgoing) and self._broken_out is None:
            await self._changed.park()
        if self._broken_out is not None:
            raise self._broken_out

    def _forget(self, count: int) -> None:
        while self._outgoing and count >= len(self._outgoing[0]):
            count -= len(self._outgoing.pop(0))
        if count:
            self._outgoing[0] = self._outgoing[0][count:]

    async def _in_thread(self, limiter: trio.CapacityLimiter, call: Callable[[], T]) -> T:
        try:
            return await trio.to_thread.run_sync(call, abandon_on_cancel=True, limiter=limiter)
        except ssl.SSLError as error:
            raise ChannelBroken(
                f"the TLS connection with {self._below.peer} is broken: {sentence(error)}"
            ) from error
