"""What every transport's channels must do, as functions that any test framework can call.

Each check takes a *maker*, an async function that sets up a fresh channel and returns its `Ends`, and raises
`Nonconformance` with a sentence when the channel breaks the contract of `kvmmig.transport`::

    async def tcp_ends():
        async with await TcpTransport(TransportURI.parse("tcp:127.0.0.1:0")).listen() as listener:
            sender = await TcpTransport(TransportURI.parse(listener.uri)).connect()
            return stream_ends(sender, await listener.accept())

    @pytest.mark.parametrize("check", [*CHECKS, *STREAM_CHECKS, *CLOGGED_CHECKS])
    async def test_tcp(check):
        await check(tcp_ends)

`CHECKS` are for all; `STREAM_CHECKS` and `STORED_CHECKS` for what `stream_ends` and `stored_ends` return;
`CLOGGED_CHECKS` want a maker whose sender clogs up after a while as long as nobody receives. Any stream is
its own clogged maker. The checks are seeded, so a failure comes again; `kvmmig.testing.plans` has one more
that hypothesis drives.
"""

from __future__ import annotations

import random
from contextlib import suppress
from functools import partial

import trio
import trio.testing

from kvmmig.errors import ChannelBroken, ChannelBusy, ChannelClosed, ConnectFailed
from kvmmig.migration.stall_meter import StallMeter
from kvmmig.testing._ends import Check, Maker, opened, promise
from kvmmig.testing._moving import (
    offer,
    raises,
    random_cancel,
    receive_all,
    require,
    require_checkpoints,
    require_same,
    send_all,
    split,
    transfer,
)
from kvmmig.testing.leftovers import leftovers
from kvmmig.transport import ReceiveChannel, SendChannel

_GONE = 10.0  # seconds for the last of what an abort has ended
_AT_ONCE = 3.0  # seconds, for what should take microseconds
_BULK = (9 << 20) + 12345  # more than the pipes, sockets and blocks on the way hold
_FLUSHED = 20_000  # bytes; little enough for a channel that takes one at a time
_FLUSH_PATIENCE = 10.0  # seconds
_A_WHILE = 0.2  # seconds for a sender to clog up
_CLOG = 256 << 20  # no channel may swallow as much as this with nobody at its other end
_ONE_CALL = 8 << 20  # bytes: a bound on a call of about a millisecond, with much room for faster machines
_HELD = 0.25  # seconds that no turn of the loop lasts, except on a host that has no time for us
_HELD_OFTEN = 3  # so many such turns in one short check are the channel's doing


@promise
async def check_bytes_arrive_in_order(maker: Maker) -> None:
    """Whatever the buffers' sizes: what was accepted is a prefix, and all of it arrives, in order."""
    chance = random.Random(1)
    data = chance.randbytes(_BULK)

    async def send(sender: SendChannel) -> None:
        cursor = 0
        while cursor < len(data):
            cursor += await offer(sender, split(chance, data, cursor))

    async with opened(maker) as ends:
        got, _ = await transfer(ends, send)
        require_same(got, data)


@promise
async def check_cancelled_calls_move_nothing(maker: Maker) -> None:
    """Sends and receives that are cancelled, at random moments, neither lose nor repeat a byte."""
    chance = random.Random(2)
    data = chance.randbytes(_BULK)

    async def send(sender: SendChannel) -> None:
        cursor = 0
        while cursor < len(data):
            with random_cancel(chance):
                cursor += await offer(sender, split(chance, data, cursor))

    async with opened(maker) as ends:
        got, _ = await transfer(ends, send, partial(receive_all, cancels=random.Random(3)))
        require_same(got, data)


@promise
async def check_cancelled_send_accepts_nothing(maker: Maker) -> None:
    """A call that was cancelled before it began does nothing, even when the sink is ready."""

    async def send(sender: SendChannel) -> None:
        with trio.CancelScope() as scope:
            scope.cancel()
            await sender.send_some([memoryview(b"cancelled")])
        require(scope.cancelled_caught, "send_some ignored a cancel that came before it: it is no checkpoint")
        await send_all(sender, b"accepted")

    async with opened(maker) as ends:
        got, _ = await transfer(ends, send)
        require_same(got, b"accepted")


@promise
async def check_calls_are_checkpoints(maker: Maker) -> None:
    """Every successful call lets other tasks run and be cancelled, even when it need not wait."""

    async def send(sender: SendChannel) -> None:
        for _ in range(3):
            with require_checkpoints("send_some"):
                await sender.send_some([memoryview(b"ready")])
        with require_checkpoints("flush"):
            await sender.flush()
        with require_checkpoints("aclose"):
            await sender.aclose()

    async with opened(maker) as ends:
        _, receiver = await transfer(ends, send)
        with require_checkpoints("receive_some at the end"):
            await receiver.receive_some(memoryview(bytearray(1)))
        for _ in range(2):
            with require_checkpoints("aclose"):
                await receiver.aclose()


@promise
async def check_flush_can_be_cancelled(maker: Maker) -> None:
    """After a cancelled flush the channel goes on, and what had been accepted arrives once."""

    async def send(sender: SendChannel) -> None:
        await send_all(sender, b"before ")
        with trio.CancelScope() as scope:
            scope.cancel()
            await sender.flush()
        require(scope.cancelled_caught, "flush ignored a cancel that came before it: it is no checkpoint")
        await send_all(sender, b"between ")
        await sender.flush()
        await sender.flush()
        await send_all(sender, b"after")

    async with opened(maker) as ends:
        got, _ = await transfer(ends, send)
        require_same(got, b"before between after")


@promise
async def check_flush_means_delivered(maker: Maker) -> None:
    """After flush the buffers are the sender's again, and nothing more need be called for all to arrive."""
    data = random.Random(5).randbytes(_FLUSHED)
    flushed, arrived = trio.Event(), trio.Event()
    got = bytearray()

    async def send(sender: SendChannel) -> None:
        buffer = bytearray(data)
        await send_all(sender, buffer)
        await sender.flush()
        buffer[:] = bytes(len(buffer))
        flushed.set()
        if not ends.stored:
            with trio.move_on_after(_FLUSH_PATIENCE) as scope:
                await arrived.wait()
            require(
                not scope.cancelled_caught,
                f"flush has returned, but only {len(got)} of {len(data)} bytes arrive while the sender rests",
            )

    async def receive(receiver: ReceiveChannel) -> bytes:
        buffer = memoryview(bytearray(100_000))
        while count := await receiver.receive_some(buffer):
            got.extend(buffer[:count])
            if len(got) >= len(data):
                arrived.set()
        return bytes(got)

    async with opened(maker) as ends:
        await transfer(ends, send, receive)
        require(flushed.is_set(), "flush never returned")
        require_same(bytes(got), data)


@promise
async def check_no_call_holds_the_loop(maker: Maker) -> None:
    """However much is offered, a call moves a bounded part of it, and no turn of the loop is long."""
    offered = memoryview(bytes(_CLOG))

    async def send(sender: SendChannel) -> None:
        for _ in range(5):
            count = await offer(sender, [offered])
            require(
                count <= _ONE_CALL,
                f"send_some took {count} bytes at once, which holds the event loop; take {_ONE_CALL} at most",
            )

    async with opened(maker) as ends:
        with StallMeter() as meter:
            await transfer(ends, send)
        turns = meter.turns.snapshot()
        held = sum(count for upper, count in turns.buckets if upper > _HELD)
        require(
            held < _HELD_OFTEN,
            f"the event loop was held {held} times for more than {_HELD} s, for {turns.worst:.2f} s at worst",
        )


@promise
async def check_abort_leaves_nothing(maker: Maker) -> None:
    """After an abort with much on its way no process and no file descriptor is left."""
    before = leftovers()
    async with opened(maker) as ends:
        with trio.move_on_after(_A_WHILE):
            await send_all(ends.sender, bytes(4 * _BULK))
    with trio.move_on_after(_GONE):
        while leftovers() - before:  # noqa: ASYNC110 - nothing tells when the last of them has gone
            await trio.sleep(0.01)
    left = leftovers() - before
    require(not left, f"abort has left behind: {', '.join(sorted(left))}")


@promise
async def check_end_of_stream_is_zero(maker: Maker) -> None:
    """After the last byte receive_some returns 0, and 0 again."""
    async with opened(maker) as ends:
        _, receiver = await transfer(ends, lambda sender: send_all(sender, b"x"))
        again = await receiver.receive_some(memoryview(bytearray(10)))
        require(again == 0, f"receive_some returned {again} after the end of the stream")


@promise
async def check_closing_is_idempotent(maker: Maker) -> None:
    """aclose and abort may follow each other, twice; every other call then raises ChannelClosed."""
    async with opened(maker) as ends:
        _, receiver = await transfer(ends, lambda sender: send_all(sender, b"x"))
        for channel in (ends.sender, receiver):
            await channel.aclose()
            await channel.aclose()
            channel.abort()
            channel.abort()
            await channel.aclose()
        await _require_closed(ends.sender)
        with raises(ChannelClosed, "receive_some after aclose"):
            await receiver.receive_some(memoryview(bytearray(1)))


@promise
async def check_dead_receiver_is_noticed(maker: Maker) -> None:
    """A sender whose other end is gone gets ChannelBroken, sooner or later, and then at each call."""
    async with opened(maker) as ends:
        (await ends.receive()).abort()
        with raises(ChannelBroken, "sending to an end that has been aborted"):
            await send_all(ends.sender, bytes(_CLOG))
        with raises(ChannelBroken, "the call after the one that raised ChannelBroken"):
            await ends.sender.send_some([memoryview(b"x")])


@promise
async def check_waiting_receiver_is_woken(maker: Maker) -> None:
    """A receiver that waits is woken by its own abort; a second one meanwhile gets ChannelBusy."""
    async with opened(maker) as ends:
        receiver = await ends.receive()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_receive_until_closed, receiver)
            await trio.testing.wait_all_tasks_blocked(0.02)
            with raises(ChannelBusy, "a second receive_some at the same time"), trio.fail_after(_AT_ONCE):
                await receiver.receive_some(memoryview(bytearray(1)))
            receiver.abort()


@promise
async def check_dead_sender_ends_the_stream(maker: Maker) -> None:
    """A receiver that waits for a sender that aborts gets ChannelBroken or the end, not silence."""
    async with opened(maker) as ends:
        await offer(ends.sender, [memoryview(b"half of it")])
        receiver = await ends.receive()
        ends.sender.abort()
        with suppress(ChannelBroken):
            await receive_all(receiver)


@promise
async def check_aborted_file_never_appears(maker: Maker) -> None:
    """What was sent before an abort can't be received: it is not the whole."""
    async with opened(maker) as ends:
        await send_all(ends.sender, bytes(_BULK))
        await ends.sender.flush()
        ends.sender.abort()
        await ends.sender.aclose()
        with raises(ConnectFailed, "receiving what an aborted sender had sent"):
            await ends.receive()


@promise
async def check_abort_frees_a_clogged_sender(maker: Maker) -> None:
    """abort returns at once; the task that waits in send_some gets ChannelClosed, and so do later calls."""
    async with opened(maker) as ends:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_send_until_closed, ends.sender)
            await trio.testing.wait_all_tasks_blocked(0.1)
            ends.sender.abort()
        await _require_closed(ends.sender)
        ends.sender.abort()
        await ends.sender.aclose()


@promise
async def check_clogged_sender_can_be_cancelled(maker: Maker) -> None:
    """A cancel frees a sender that waits; a second sender meanwhile gets ChannelBusy."""
    async with opened(maker) as ends, trio.open_nursery() as nursery:
        nursery.start_soon(_send_until_closed, ends.sender)
        await trio.testing.wait_all_tasks_blocked(0.1)
        with raises(ChannelBusy, "a second send_some at the same time"), trio.fail_after(_AT_ONCE):
            await ends.sender.send_some([memoryview(b"x")])
        nursery.cancel_scope.cancel()


#: For every channel.
CHECKS: tuple[Check, ...] = (
    check_bytes_arrive_in_order,
    check_cancelled_calls_move_nothing,
    check_cancelled_send_accepts_nothing,
    check_calls_are_checkpoints,
    check_flush_can_be_cancelled,
    check_flush_means_delivered,
    check_no_call_holds_the_loop,
    check_abort_leaves_nothing,
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


async def _send_until_closed(sender: SendChannel) -> None:
    with raises(ChannelClosed, "send_some while the channel is aborted"):
        await send_all(sender, bytes(_CLOG))


async def _receive_until_closed(receiver: ReceiveChannel) -> None:
    with raises(ChannelClosed, "receive_some while the channel is aborted"):
        await receiver.receive_some(memoryview(bytearray(1)))


async def _require_closed(sender: SendChannel) -> None:
    with raises(ChannelClosed, "send_some on a closed channel"):
        await sender.send_some([memoryview(b"x")])
    with raises(ChannelClosed, "flush on a closed channel"):
        await sender.flush()
