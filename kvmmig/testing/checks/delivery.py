"""What was accepted arrives, once and in order, whatever is cancelled."""

from __future__ import annotations

import random
from functools import partial

import trio

from kvmmig.testing._ends import Maker, opened, promise
from kvmmig.testing._transfer import (
    offer,
    random_cancel,
    receive_all,
    require,
    require_checkpoints,
    require_same,
    send_all,
    split,
    transfer,
)
from kvmmig.transport import ReceiveChannel, SendChannel

_BULK = (9 << 20) + 12345  # more than the pipes, sockets and blocks on the way hold
_FLUSHED = 20_000  # bytes; little enough for a channel that takes one at a time
_FLUSH_PATIENCE = 10.0  # seconds


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
async def check_end_of_stream_is_zero(maker: Maker) -> None:
    """After the last byte receive_some returns 0, and 0 again."""
    async with opened(maker) as ends:
        _, receiver = await transfer(ends, lambda sender: send_all(sender, b"x"))
        again = await receiver.receive_some(memoryview(bytearray(10)))
        require(again == 0, f"receive_some returned {again} after the end of the stream")


@promise
async def check_buffers_can_be_used_again(maker: Maker) -> None:
    """Buffers are the caller's again at once where the channel says that it copies, and else after flush."""
    data = random.Random(7).randbytes(_FLUSHED)

    async def send(sender: SendChannel) -> None:
        cursor, buffer = 0, bytearray(1000)
        while cursor < len(data):
            size = min(len(buffer), len(data) - cursor)
            buffer[:size] = data[cursor : cursor + size]
            cursor += await offer(sender, [memoryview(buffer)[:size]])
            if not sender.copies:
                await sender.flush()
            buffer[:] = bytes(len(buffer))

    async with opened(maker) as ends:
        got, _ = await transfer(ends, send)
        require_same(got, data)
