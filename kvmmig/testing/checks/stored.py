"""A stored channel: there is nothing under its name before `aclose` has returned."""

from __future__ import annotations

import random
from contextlib import suppress

import trio

from kvmmig.errors import ConnectFailed, TransportError
from kvmmig.testing._ends import Ends, Maker, Nonconformance, NotApplicable, opened, promise
from kvmmig.testing._transfer import raises, receive_all, require, send_all

_BULK = (9 << 20) + 12345
_MOMENTS = (0, 1, 2, 3, 5, 8, 13, 30, 100)  # turns of the loop after which a commit is cancelled
_AT_ONCE = 3.0  # seconds, for what should take microseconds


def _stored(ends: Ends) -> Ends:
    if not ends.stored:
        raise NotApplicable("the channel is a connection")
    return ends


@promise
async def check_aborted_file_never_appears(maker: Maker) -> None:
    """What was sent before an abort can't be received: it is not the whole."""
    async with opened(maker) as ends:
        await send_all(_stored(ends).sender, random.Random(9).randbytes(_BULK))
        await ends.sender.flush()
        ends.sender.abort()
        await ends.sender.aclose()
        with raises(ConnectFailed, "receiving what an aborted sender had sent"):
            await ends.receive()


@promise
async def check_block_that_fails_stores_nothing(maker: Maker) -> None:
    """A channel's block that fails, or is cancelled, aborts it: half a file gets no name."""
    async with opened(maker) as ends:
        with trio.CancelScope() as scope:
            async with _stored(ends).sender as sender:
                await send_all(sender, b"half of it")
                scope.cancel()
                await trio.lowlevel.checkpoint()
        with raises(ConnectFailed, "receiving what was sent in a block that was cancelled"):
            await ends.receive()


@promise
async def check_cancelled_commit_leaves_nothing(maker: Maker) -> None:
    """An aclose that is cancelled, at any moment, has committed all of it or nothing."""
    data = random.Random(10).randbytes(300_000)
    for turns in _MOMENTS:
        async with opened(maker) as ends:
            await send_all(_stored(ends).sender, data)
            if await _cancelled_after(turns, ends):
                with raises(ConnectFailed, f"receiving after an aclose cancelled at turn {turns}"):
                    await ends.receive()
            else:
                got = await receive_all(await ends.receive())
                require(got == data, "aclose has returned, and what can be received is not what was sent")
                return


async def _cancelled_after(turns: int, ends: Ends) -> bool:
    async with trio.open_nursery() as nursery:

        async def cancel() -> None:
            for _ in range(turns):
                await trio.lowlevel.checkpoint()
            closing.cancel()

        with trio.CancelScope() as closing:
            nursery.start_soon(cancel)
            await ends.sender.aclose()
        nursery.cancel_scope.cancel()
    return closing.cancelled_caught


@promise
async def check_stalled_commit_can_be_cancelled(maker: Maker) -> None:
    """An aclose that makes no progress ends when it is cancelled; the channel is then as after an abort."""
    async with opened(maker) as ends:
        with trio.move_on_after(0.1):
            await send_all(_stored(ends).sender, random.Random(11).randbytes(100_000))
        began = trio.current_time()
        with trio.move_on_after(0.2) as scope:
            await ends.sender.aclose()
        took = trio.current_time() - began
        require(took < _AT_ONCE, f"aclose ended {took:.1f} s after it was cancelled")
        require(scope.cancelled_caught, "aclose has returned, though nothing can have been stored")
        with suppress(TransportError):
            with trio.move_on_after(_AT_ONCE):
                got = await receive_all(await ends.receive())
                raise Nonconformance(f"{len(got)} bytes can be received after a commit that was cancelled")
