"""Several connections as one channel: what it carries is dealt out to them in turn, and put together again.

Each connection has a lane of its own, so several threads copy at a time. It begins with a hello that says
which of how many it is, and of which bundle. Behind that each direction is cut into chunks, a length (u64,
little-endian) and so many bytes; chunk ``k`` goes through connection ``k`` modulo their number.
"""

from __future__ import annotations

import logging
import os
import struct
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import cast

import trio

from kvmmig.errors import BadURI, ChannelBroken, ChannelClosed, ConnectFailed, TransportError
from kvmmig.transport.boundedlog import BoundedLog
from kvmmig.transport.contract import Channel, Listener, Option, ReceiveChannel
from kvmmig.transport.toolkit.buffers import behind
from kvmmig.transport.toolkit.one_at_a_time import OneAtATime
from kvmmig.transport.toolkit.sockets import SocketChannel, SocketListener
from kvmmig.transport.toolkit.tasks import own_tasks
from kvmmig.transport.uri import TransportURI
from kvmmig.units import Range, parse_count

_log = logging.getLogger("kvmmig.transport")

_MOST_LANES = Range(1, 16)
_HELLO = struct.Struct("<8s16sHH4x")  # what it is, the bundle's identity, which connection, of how many
_MAGIC = b"kvmlanes"
_LENGTH = struct.Struct("<Q")
#: Bytes offered at a time: a chunk for each connection.
_CALL = 16 << 20
#: Seconds that a connection may take for its hello, and a bundle until it is complete.
_HELLO_TIMEOUT = 10.0
#: Bundles at a time that are not complete yet; of too many the oldest makes room.
_MOST_INCOMPLETE = 16
#: Seconds after which what has come is given to the caller, although more is wanted.
_PATIENCE = 0.1

Connect = Callable[[], AbstractAsyncContextManager[SocketChannel]]


class Lanes:
    """The option ``lanes`` of a transport with connections: how many of them are one channel."""

    option = Option("lanes", "connections at a time, 1 to 16; both sides say the same number", default="1")

    def __init__(self, uri: TransportURI, value: str) -> None:
        """``value`` is the option's. Raises `BadURI`."""
        try:
            self._count = parse_count(value, _MOST_LANES)
        except ValueError as error:
            raise BadURI(f"{str(uri)!r}: lanes: {error}") from error

    @asynccontextmanager
    async def connect(self, connect: Connect) -> AsyncIterator[Channel]:
        """So many connections as one channel, each of them made by ``connect``."""
        async with AsyncExitStack() as stack:
            members = [await stack.enter_async_context(connect()) for _ in range(self._count)]
            if self._count == 1:
                yield members[0]
                return
            identity = os.urandom(16)
            for number, member in enumerate(members):
                hello = memoryview(_HELLO.pack(_MAGIC, identity, number, self._count))
                while len(hello):
                    hello = hello[await member.send_some([hello]) :]
            async with _bundled(members) as bundle:
                yield bundle

    def listener(self, inner: SocketListener) -> SocketListener | BundleListener:
        """What accepts so many connections as one channel. Takes over ``inner``."""
        return inner if self._count == 1 else BundleListener(inner, self._count)


class BundleListener(Listener):
    """Puts together the `SocketChannel` that ``inner`` accepts, ``lanes`` a channel. Strays are passed over.

    Those of an incomplete bundle are ended when they are too old, or too many, or at `close`.
    """

    several = True

    def __init__(self, inner: SocketListener, lanes: int) -> None:
        """Takes over ``inner``."""
        where = inner.uri
        self.uri = TransportURI(
            where.scheme, where.target, {**where.options, "lanes": str(lanes)}, where.wrappers
        )
        self._inner = inner
        self._lanes = lanes
        self._turn = trio.Lock()
        self._warnings = BoundedLog(_log)
        self._incomplete: dict[bytes, _Incomplete] = {}

    @asynccontextmanager
    async def accept(self) -> AsyncIterator[Channel]:
        async with _bundled(await self._members()) as bundle:
            yield bundle

    def close(self) -> None:
        """Stop listening. Idempotent."""
        self._inner.close()
        for identity in list(self._incomplete):
            self._give_up(identity)

    async def _members(self) -> list[SocketChannel]:
        while True:
            async with self._turn:
                member = cast(SocketChannel, await self._inner.accept_one())
            try:
                whole = self._join(*await self._hello(member), member)
                if whole is not None:
                    return whole
            except TransportError as error:
                member.abort()
                self._warnings.warn(f"a client was passed over: {error}")
            except BaseException:
                member.abort()
                raise

    async def _hello(self, member: SocketChannel) -> tuple[bytes, int]:
        block = memoryview(bytearray(_HELLO.size))
        with trio.move_on_after(_HELLO_TIMEOUT):
            await _receive_exactly(member, block)
            magic, identity, number, count = _HELLO.unpack(block)
            if magic != _MAGIC:
                raise ConnectFailed(f"{member.peer} came without lanes; have it say lanes={self._lanes}")
            if count != self._lanes or number >= count:
                raise ConnectFailed(f"{member.peer} came with lanes={count}, not with lanes={self._lanes}")
            return identity, number
        raise ConnectFailed(f"{member.peer} did not say which lane it is within {_HELLO_TIMEOUT:g} s")

    def _join(self, identity: bytes, number: int, member: SocketChannel) -> list[SocketChannel] | None:
        """Take over ``member``. All of its bundle, where it is complete now."""
        now = trio.current_time()
        for other in [key for key, one in self._incomplete.items() if now - one.begun > _HELLO_TIMEOUT]:
            self._give_up(other)
        if identity not in self._incomplete and len(self._incomplete) == _MOST_INCOMPLETE:
            self._give_up(next(iter(self._incomplete)))
        members = self._incomplete.setdefault(identity, _Incomplete(now)).members
        if number in members or any(_owner(member) != _owner(known) for known in members.values()):
            raise ConnectFailed(f"{member.peer} is no part of the bundle that it names")
        members[number] = member
        if len(members) < self._lanes:
            return None
        del self._incomplete[identity]
        return [members[number] for number in range(self._lanes)]

    def _give_up(self, identity: bytes) -> None:
        for member in self._incomplete.pop(identity).members.values():
            member.abort()


def _owner(member: SocketChannel) -> tuple[object, ...]:
    known = member.identity
    return (known.user, known.process, known.host) if known is not None else ()


class _Incomplete:
    """The connections of one bundle that have come so far."""

    def __init__(self, begun: float) -> None:
        self.begun = begun
        self.members: dict[int, SocketChannel] = {}


@asynccontextmanager
async def _bundled(members: Sequence[SocketChannel]) -> AsyncIterator[Channel]:
    """Takes over ``members``."""
    async with own_tasks() as nursery, _Bundle(members, nursery) as bundle:
        yield bundle


class _Inbound:
    """One connection, as the receiving side sees it."""

    def __init__(self, channel: SocketChannel) -> None:
        self.channel = channel
        #: Bytes of its chunk that the caller has not got yet; 0 while the next chunk is waited for.
        self.left = 0
        #: The first of them, where they came before their turn.
        self.early = b""
        self.ended = False
        self.consumed = trio.Event()


class _Part:
    """A stretch of the caller's buffer, and the connection that fills it."""

    def __init__(self, inbound: _Inbound, target: memoryview) -> None:
        self.inbound = inbound
        self.target = target
        self.done = min(len(inbound.early), len(target))
        self.scope = trio.CancelScope()
        self.over = trio.Event()
        target[: self.done] = inbound.early[: self.done]
        inbound.early = inbound.early[self.done :]

    def put_back(self) -> None:
        """It came before its turn: keep what there is for the next call."""
        self.inbound.early = bytes(self.target[: self.done]) + self.inbound.early


class _Bundle(Channel):
    call_size = _CALL

    def __init__(self, members: Sequence[SocketChannel], nursery: trio.Nursery) -> None:
        self.peer = members[0].peer
        self.identity = members[0].identity
        self.proved = all(member.proved for member in members)
        self._members = members
        self._nursery = nursery
        self._most = _CALL // len(members)  # bytes of a chunk
        self._sent = self._received = 0  # chunks
        self._inbound = [_Inbound(member) for member in members]
        self._news = trio.lowlevel.ParkingLot()
        self._failure: TransportError | None = None
        self._sending = OneAtATime("sending")
        self._receiving = OneAtATime("receiving")
        for inbound in self._inbound:
            nursery.start_soon(self._watch, inbound)

    async def send_some(self, buffers: Sequence[memoryview]) -> int:
        with self._sending:
            count = sent = await self._next_out().send_chunk(buffers, self._most, _LENGTH.pack)
            self._sent += 1
            for _ in self._members[1:]:  # nothing from here on waits
                buffers = behind(buffers, count)
                count = (
                    self._next_out().send_chunk_at_once(buffers, self._most, _LENGTH.pack) if buffers else 0
                )
                if not count:
                    break
                self._sent += 1
                sent += count
            return sent

    async def receive_some(self, buffer: memoryview) -> int:
        with self._receiving:
            await trio.lowlevel.checkpoint()
            while True:
                if self._failure is not None:
                    raise self._failure
                parts = self._parts(buffer)
                if not parts and self._next_in(0).ended:
                    return 0
                if not parts:
                    await self._news.park()
                elif count := await self._filled(parts):
                    return count

    async def flush(self) -> None:
        for member in self._members:
            await member.flush()

    def abort(self) -> None:
        self._end()
        for member in self._members:
            member.abort()

    async def aclose(self) -> None:
        try:
            for member in self._members:
                await member.aclose()
        except BaseException:
            self.abort()
            raise
        self._end()

    def _end(self) -> None:
        self._failure = ChannelClosed(f"the connections to {self.peer} were closed by this side")
        self._news.unpark_all()

    def _next_out(self) -> SocketChannel:
        return self._members[self._sent % len(self._members)]

    def _next_in(self, number: int) -> _Inbound:
        return self._inbound[(self._received + number) % len(self._inbound)]

    async def _watch(self, inbound: _Inbound) -> None:
        """Wait for each chunk's length, so that it is known when its turn comes."""
        length = memoryview(bytearray(_LENGTH.size))
        try:
            while await _receive_exactly(inbound.channel, length, may_end=True):
                inbound.consumed = trio.Event()
                (inbound.left,) = _LENGTH.unpack(length)
                if not inbound.left:
                    raise ChannelBroken(f"{self.peer} sent a chunk of no bytes")
                self._news.unpark_all()
                await inbound.consumed.wait()
            inbound.ended = True
        except TransportError as error:
            self._failure = self._failure or error
        self._news.unpark_all()

    def _parts(self, buffer: memoryview) -> list[_Part]:
        """What of ``buffer`` each connection is to fill, in order; none where the next chunk has not come."""
        parts: list[_Part] = []
        for number in range(len(self._inbound)):
            inbound = self._next_in(number)
            size = min(inbound.left, len(buffer))
            if not size:
                break
            parts.append(_Part(inbound, buffer[:size]))
            buffer = buffer[size:]
        return parts

    async def _filled(self, parts: Sequence[_Part]) -> int:
        """Have all of them filled, or what there is of them when the caller's patience ends, or ours."""
        for part in parts:
            self._nursery.start_soon(self._fill, part)
        try:
            with trio.move_on_after(_PATIENCE):
                for part in parts:
                    await part.over.wait()
        except trio.Cancelled:
            count = await self._settled(parts)
            if not count:
                raise
            return count  # the next checkpoint is cancelled
        return await self._settled(parts)

    async def _settled(self, parts: Sequence[_Part]) -> int:
        """Have nobody write into them any more; a few milliseconds."""
        with trio.CancelScope(shield=True):
            for part in parts:
                part.scope.cancel()
                await part.over.wait()
        return self._take(parts)

    async def _fill(self, part: _Part) -> None:
        try:
            with part.scope:
                while part.done < len(part.target):
                    count = await part.inbound.channel.receive_some(part.target[part.done :])
                    if not count:
                        raise ChannelBroken(f"{self.peer} ended in the middle of a chunk")
                    part.done += count
        except TransportError as error:
            self._failure = self._failure or error
        finally:
            part.over.set()

    def _take(self, parts: Sequence[_Part]) -> int:
        """The caller gets what is there in order; its length."""
        count = 0
        for number, part in enumerate(parts):
            count += part.done
            part.inbound.left -= part.done
            if not part.inbound.left:
                self._received += 1
                part.inbound.consumed.set()
            if part.done < len(part.target):
                for later in parts[number + 1 :]:
                    later.put_back()
                break
        return count


async def _receive_exactly(channel: ReceiveChannel, into: memoryview, *, may_end: bool = False) -> bool:
    """Fill it; False where the stream ends before its first byte, if it may."""
    done = 0
    while done < len(into):
        count = await channel.receive_some(into[done:])
        if not count and not done and may_end:
            return False
        if not count:
            raise ChannelBroken(f"{channel.peer} ended before it had said what comes")
        done += count
    return True
