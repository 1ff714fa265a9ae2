"""How a channel ends, on either side, and a sender that is clogged."""

from __future__ import annotations

from contextlib import suppress

import trio
import trio.testing

from kvmmig.errors import ChannelBroken, ChannelBusy, ChannelClosed
from kvmmig.testing._ends import Maker, Nonconformance, opened, promise
from kvmmig.testing._transfer import (
    incompressible,
    offer,
    raises,
    receive_all,
    require,
    send_all,
    transfer,
)
from kvmmig.testing.leftovers import left_after, leftovers
from kvmmig.transport import ReceiveChannel, SendChannel

_GONE = 10.0  # seconds for the last of what an abort has ended
_AT_ONCE = 3.0  # seconds, for what should take microseconds
_A_WHILE = 0.2  # seconds for a sender to clog up
_CLOG = 256 << 20  # no channel may swallow as much as this with nobody at its other end


@promise
async def check_abort_leaves_nothing(maker: Maker) -> None:
    """After an abort with much on its way no process and no file descriptor is left."""
    before = leftovers()
    async with opened(maker) as ends:
        with trio.move_on_after(_A_WHILE):
            await send_all(ends.sender, incompressible())
    left = await left_after(before, _GONE)
    require(not left, f"abort has left behind: {', '.join(sorted(left))}")


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
            await _send_much(ends.sender)
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


async def _send_until_closed(sender: SendChannel) -> None:
    with raises(ChannelClosed, "send_some while the channel is aborted"):
        await _send_much(sender)
        raise Nonconformance(
            f"send_some took {_CLOG >> 20} MiB with nobody at the other end; it must clog up"
        )


async def _receive_until_closed(receiver: ReceiveChannel) -> None:
    with raises(ChannelClosed, "receive_some while the channel is aborted"):
        await receiver.receive_some(memoryview(bytearray(1)))


async def _require_closed(sender: SendChannel) -> None:
    with raises(ChannelClosed, "send_some on a closed channel"):
        await sender.send_some([memoryview(b"x")])
    with raises(ChannelClosed, "flush on a closed channel"):
        await sender.flush()


async def _send_much(sender: SendChannel) -> None:
    for _ in range(_CLOG // len(incompressible())):
        await send_all(sender, incompressible())
