"""What every transport's channels must do, as functions that any test framework can call.

Each check takes a *maker*, an async function that sets up a fresh channel and returns its `Ends`, and raises
`Nonconformance` with a sentence when the channel breaks the contract of `kvmmig.migration.transport`::

    async def tcp_ends():
        async with await TcpTransport(TransportURI.parse("tcp:127.0.0.1:0")).listen() as listener:
            sender = await TcpTransport(TransportURI.parse(listener.uri)).connect()
            return stream_ends(sender, await listener.accept())

    @pytest.mark.parametrize("check", [*CHECKS, *STREAM_CHECKS, *CLOGGED_CHECKS])
    async def test_tcp(check):
        await check(tcp_ends)

`CHECKS` are for all; `STREAM_CHECKS` and `STORED_CHECKS` for what `stream_ends` and `stored_ends` return;
`CLOGGED_CHECKS` want a maker whose sender clogs up after a while as long as nobody receives. Any stream is
its own clogged maker. The checks are seeded, so a failure comes again.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass

import trio
import trio.testing

from kvmmig.errors import ChannelBroken, ChannelBusy, ChannelClosed, ConnectFailed, TransportError
from kvmmig.migration.transport import Channel

_PATIENCE = 30.0  # seconds that a check waits for what should take milliseconds
_AT_ONCE = 3.0  # seconds, for what should take microseconds
_BULK = (9 << 20) + 12345  # more than the pipes, sockets and blocks on the way hold
_CLOG = 256 << 20  # no channel may swallow as much as this with nobody at its other end


class Nonconformance(AssertionError):
    """The channel breaks the contract; the text says how."""


@dataclass(frozen=True)
class Ends:
    """The two ends of one fresh channel."""

    sender: Channel
    #: Returns the receiver; for a stored channel only after the sender's `aclose`.
    receive: Callable[[], Awaitable[Channel]]
    #: Whether the bytes can be received only when all were sent: a file, not a connection.
    stored: bool


Maker = Callable[[], Awaitable[Ends]]
Check = Callable[[Maker], Awaitable[None]]


def stream_ends(sender: Channel, receiver: Channel) -> Ends:
    """The ends of a connection."""

    async def receive() -> Channel:
        return receiver

    return Ends(sender, receive, stored=False)


def stored_ends(sender: Channel, receive: Callable[[], Awaitable[Channel]]) -> Ends:
    """The ends of a file: written first, then opened for reading by ``receive``."""
    return Ends(sender, receive, stored=True)


async def check_bytes_arrive_in_order(maker: Maker) -> None:
    """Whatever the buffers' sizes: what was accepted is a prefix, and all of it arrives, in order."""
    chance = random.Random(1)
    data = chance.randbytes(_BULK)

    async def send(sender: Channel) -> None:
        cursor = 0
        while cursor < len(data):
            cursor += await _send(sender, _split(chance, data, cursor))

    async with _opened(maker) as ends:
        got, _ = await _transfer(ends, send)
        _require_same(got, data)


async def check_cancelled_calls_move_nothing(maker: Maker) -> None:
    """Sends and receives that are cancelled, at random moments, neither lose nor repeat a byte."""
    chance = random.Random(2)
    data = chance.randbytes(_BULK)

    async def send(sender: Channel) -> None:
        cursor = 0
        while cursor < len(data):
            with _random_cancel(chance):
                cursor += await _send(sender, _split(chance, data, cursor))

    async with _opened(maker) as ends:
        got, _ = await _transfer(ends, send, random.Random(3))
        _require_same(got, data)


async def check_cancelled_send_accepts_nothing(maker: Maker) -> None:
    """A call that was cancelled before it began does nothing, even when the sink is ready."""

    async def send(sender: Channel) -> None:
        with trio.CancelScope() as scope:
            scope.cancel()
            await sender.send_some([memoryview(b"cancelled")])
        _require(
            scope.cancelled_caught, "send_some ignored a cancel that came before it: it is no checkpoint"
        )
        await _send_all(sender, b"accepted")

    async with _opened(maker) as ends:
        got, _ = await _transfer(ends, send)
        _require_same(got, b"accepted")


async def check_calls_are_checkpoints(maker: Maker) -> None:
    """Every successful call lets other tasks run and be cancelled, even when it need not wait."""

    async def send(sender: Channel) -> None:
        for _ in range(3):
            with _require_checkpoints("send_some"):
                await sender.send_some([memoryview(b"ready")])
        with _require_checkpoints("flush"):
            await sender.flush()
        with _require_checkpoints("aclose"):
            await sender.aclose()

    async with _opened(maker) as ends:
        _, receiver = await _transfer(ends, send)
        with _require_checkpoints("receive_some at the end"):
            await receiver.receive_some(memoryview(bytearray(1)))
        for _ in range(2):
            with _require_checkpoints("aclose"):
                await receiver.aclose()


async def check_flush_can_be_cancelled(maker: Maker) -> None:
    """After a cancelled flush the channel goes on, and what had been accepted arrives once."""

    async def send(sender: Channel) -> None:
        await _send_all(sender, b"before ")
        with trio.CancelScope() as scope:
            scope.cancel()
            await sender.flush()
        _require(scope.cancelled_caught, "flush ignored a cancel that came before it: it is no checkpoint")
        await _send_all(sender, b"between ")
        await sender.flush()
        await sender.flush()
        await _send_all(sender, b"after")

    async with _opened(maker) as ends:
        got, _ = await _transfer(ends, send)
        _require_same(got, b"before between after")


async def check_end_of_stream_is_zero(maker: Maker) -> None:
    """After the last byte receive_some returns 0, and 0 again."""
    async with _opened(maker) as ends:
        _, receiver = await _transfer(ends, lambda sender: _send_all(sender, b"x"))
        again = await receiver.receive_some(memoryview(bytearray(10)))
        _require(again == 0, f"receive_some returned {again} after the end of the stream")


async def check_closing_is_idempotent(maker: Maker) -> None:
    """aclose and abort may follow each other, twice; every other call then raises ChannelClosed."""
    async with _opened(maker) as ends:
        _, receiver = await _transfer(ends, lambda sender: _send_all(sender, b"x"))
        for channel in (ends.sender, receiver):
            await channel.aclose()
            await channel.aclose()
            channel.abort()
            channel.abort()
            await channel.aclose()
        await _require_closed(ends.sender)
        with _raises(ChannelClosed, "receive_some after aclose"):
            await receiver.receive_some(memoryview(bytearray(1)))


async def check_dead_receiver_is_noticed(maker: Maker) -> None:
    """A sender whose other end is gone gets ChannelBroken, sooner or later, and then at each call."""
    async with _opened(maker) as ends:
        (await ends.receive()).abort()
        with _raises(ChannelBroken, "sending to an end that has been aborted"):
            await _send_all(ends.sender, bytes(_CLOG))
        with _raises(ChannelBroken, "the call after the one that raised ChannelBroken"):
            await ends.sender.send_some([memoryview(b"x")])


async def check_waiting_receiver_is_woken(maker: Maker) -> None:
    """A receiver that waits is woken by its own abort; a second one meanwhile gets ChannelBusy."""
    async with _opened(maker) as ends:
        receiver = await ends.receive()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_receive_until_closed, receiver)
            await trio.testing.wait_all_tasks_blocked(0.02)
            with _raises(ChannelBusy, "a second receive_some at the same time"), trio.fail_after(_AT_ONCE):
                await receiver.receive_some(memoryview(bytearray(1)))
            receiver.abort()


async def check_dead_sender_ends_the_stream(maker: Maker) -> None:
    """A receiver that waits for a sender that aborts gets ChannelBroken or the end, not silence."""
    async with _opened(maker) as ends:
        await _send(ends.sender, [memoryview(b"half of it")])
        receiver = await ends.receive()
        ends.sender.abort()
        with suppress(ChannelBroken):
            await _receive_all(receiver)


async def check_aborted_file_never_appears(maker: Maker) -> None:
    """What was sent before an abort can't be received: it is not the whole."""
    async with _opened(maker) as ends:
        await _send_all(ends.sender, bytes(_BULK))
        await ends.sender.flush()
        ends.sender.abort()
        await ends.sender.aclose()
        with _raises(ConnectFailed, "receiving what an aborted sender had sent"):
            await ends.receive()


async def check_abort_frees_a_clogged_sender(maker: Maker) -> None:
    """abort returns at once; the task that waits in send_some gets ChannelClosed, and so do later calls."""
    async with _opened(maker) as ends:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_send_until_closed, ends.sender)
            await trio.testing.wait_all_tasks_blocked(0.1)
            ends.sender.abort()
        await _require_closed(ends.sender)
        ends.sender.abort()
        await ends.sender.aclose()


async def check_clogged_sender_can_be_cancelled(maker: Maker) -> None:
    """A cancel frees a sender that waits; a second sender meanwhile gets ChannelBusy."""
    async with _opened(maker) as ends, trio.open_nursery() as nursery:
        nursery.start_soon(_send_until_closed, ends.sender)
        await trio.testing.wait_all_tasks_blocked(0.1)
        with _raises(ChannelBusy, "a second send_some at the same time"), trio.fail_after(_AT_ONCE):
            await ends.sender.send_some([memoryview(b"x")])
        nursery.cancel_scope.cancel()


#: For every channel.
CHECKS: tuple[Check, ...] = (
    check_bytes_arrive_in_order,
    check_cancelled_calls_move_nothing,
    check_cancelled_send_accepts_nothing,
    check_calls_are_checkpoints,
    check_flush_can_be_cancelled,
    check_end_of_stream_is_zero,
    check_closing_is_idempotent,
)
#: For connections.
STREAM_CHECKS: tuple[Check, ...] = (
    check_dead_receiver_is_noticed,
    check_waiting_receiver_is_woken,
    check_dead_sender_ends_the_stream,
)
#: For files.
STORED_CHECKS: tuple[Check, ...] = (check_aborted_file_never_appears,)
#: For a sender that clogs up.
CLOGGED_CHECKS: tuple[Check, ...] = (
    check_abort_frees_a_clogged_sender,
    check_clogged_sender_can_be_cancelled,
)


@asynccontextmanager
async def _opened(maker: Maker) -> AsyncIterator[Ends]:
    """The maker's ends, aborted afterwards, within a generous time limit."""
    with trio.move_on_after(_PATIENCE) as scope:
        ends = await maker()
        opened: list[Channel] = []

        async def receive() -> Channel:
            opened.append(await ends.receive())
            return opened[-1]

        try:
            yield Ends(ends.sender, receive, ends.stored)
        except (TransportError, ExceptionGroup) as error:
            raise _sentence(error) from error
        finally:
            ends.sender.abort()
            for receiver in opened if ends.stored else [await ends.receive()]:
                receiver.abort()
    if scope.cancelled_caught:
        raise Nonconformance(f"a call on the channel hung for {_PATIENCE:.0f} s")


def _sentence(error: Exception) -> Exception:
    """The caller wants one sentence, not the tree of a nursery."""
    while isinstance(error, ExceptionGroup):
        error = (error.subgroup(Nonconformance) or error).exceptions[0]
    if isinstance(error, TransportError):
        return Nonconformance(f"an error that the contract has no place for here: {error!r}")
    return error


async def _transfer(
    ends: Ends, send: Callable[[Channel], Awaitable[None]], cancels: random.Random | None = None
) -> tuple[bytes, Channel]:
    """Everything that ``send`` sends, followed by an aclose, and the receiver, which is at its end.

    ``cancels`` disturbs the receiver.
    """
    got = b""

    async def sending() -> None:
        await send(ends.sender)
        await ends.sender.aclose()

    async def receiving() -> Channel:
        nonlocal got
        receiver = await ends.receive()
        got = await _receive_all(receiver, cancels)
        return receiver

    if ends.stored:
        await sending()
        receiver = await receiving()
        return got, receiver
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sending)
        receiver = await receiving()
    return got, receiver


def _split(chance: random.Random, data: bytes, start: int) -> list[memoryview]:
    """Some of what is left of ``data``, in buffers of random sizes, some of them tiny, some of them many."""
    view = memoryview(data)
    largest = chance.choice((1, 7, 4096, 100_000, len(data)))
    buffers = []
    for _ in range(chance.choice((1, 2, 17, 1500))):
        if start == len(data):
            break
        size = chance.randint(1, min(largest, len(data) - start))
        buffers.append(view[start : start + size])
        start += size
    return buffers


async def _send(sender: Channel, buffers: list[memoryview]) -> int:
    offered = sum(len(buffer) for buffer in buffers)
    accepted = await sender.send_some(buffers)
    _require(1 <= accepted <= offered, f"send_some was offered {offered} bytes and says it took {accepted}")
    return accepted


async def _send_all(sender: Channel, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[await _send(sender, [view]) :]


async def _receive_all(receiver: Channel, cancels: random.Random | None = None) -> bytes:
    got = bytearray()
    buffer = memoryview(bytearray(300_000))
    while True:
        count = -1
        if cancels is None:
            with _require_checkpoints("receive_some"):
                count = await receiver.receive_some(buffer)
        else:
            with _random_cancel(cancels):
                count = await receiver.receive_some(buffer[: cancels.randint(1, len(buffer))])
        if count == 0:
            return bytes(got)
        if count > 0:
            got += buffer[:count]


async def _send_until_closed(sender: Channel) -> None:
    with _raises(ChannelClosed, "send_some while the channel is aborted"):
        await _send_all(sender, bytes(_CLOG))


async def _receive_until_closed(receiver: Channel) -> None:
    with _raises(ChannelClosed, "receive_some while the channel is aborted"):
        await receiver.receive_some(memoryview(bytearray(1)))


async def _require_closed(sender: Channel) -> None:
    with _raises(ChannelClosed, "send_some on a closed channel"):
        await sender.send_some([memoryview(b"x")])
    with _raises(ChannelClosed, "flush on a closed channel"):
        await sender.flush()


@contextmanager
def _require_checkpoints(name: str) -> Iterator[None]:
    try:
        with trio.testing.assert_checkpoints():
            yield
    except AssertionError as error:
        raise Nonconformance(f"{name} returned without a checkpoint") from error


def _random_cancel(chance: random.Random) -> trio.CancelScope:
    """A scope that is cancelled already, or soon, or never."""
    kind = chance.randrange(4)
    if kind == 0:
        scope = trio.CancelScope()
        scope.cancel()
        return scope
    if kind == 1:
        return trio.move_on_after(chance.uniform(0, 0.002))
    return trio.CancelScope()


@contextmanager
def _raises(kind: type[Exception], what: str) -> Iterator[None]:
    try:
        yield
    except kind:
        return
    except Exception as error:
        raise Nonconformance(f"{what} raised {error!r}; it must raise {kind.__name__}") from error
    raise Nonconformance(f"{what} raised nothing; it must raise {kind.__name__}")


def _require_same(got: bytes, sent: bytes) -> None:
    _require(len(got) == len(sent), f"{len(sent)} bytes were accepted, {len(got)} arrived")
    if got != sent:
        where = next(i for i, (a, b) in enumerate(zip(got, sent, strict=True)) if a != b)
        raise Nonconformance(f"the bytes that arrived differ from those that were accepted, from {where} on")


def _require(holds: bool, sentence: str) -> None:
    if not holds:
        raise Nonconformance(sentence)
