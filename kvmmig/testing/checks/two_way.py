"""The way back of a two-way channel keeps the same promises, also while the other way is in use."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import cast

import trio

from kvmmig.testing._ends import Check, Ends, Maker, NotApplicable, opened, promise, stream_ends
from kvmmig.testing._transfer import receive_some_of, require, require_same, send_all
from kvmmig.transport import Channel, ReceiveChannel

_DUPLEX = (4 << 20) + 321  # bytes in each direction


def on_the_way_back(check: Check) -> Check:
    """The same check from the destination to the source."""

    async def checked(maker: Maker) -> None:
        await check(lambda: _turned_round(maker))

    checked.__name__ = f"{check.__name__}_on_the_way_back"
    checked.__doc__ = f"On the way back: {check.__doc__}"
    return checked


@asynccontextmanager
async def _turned_round(maker: Maker) -> AsyncIterator[Ends]:
    async with opened(maker) as ends:
        sender, receiver = await _both_ways(ends)
        yield stream_ends(receiver, sender)


async def _both_ways(ends: Ends) -> tuple[Channel, Channel]:
    if not ends.sender.two_way:
        raise NotApplicable("the channel goes one way")
    return cast(Channel, ends.sender), cast(Channel, await ends.receive())


@promise
async def check_both_ways_at_once(maker: Maker) -> None:
    """One task sends while another receives: both directions move at the same time, on both sides."""
    chance = random.Random(8)
    there, back = chance.randbytes(_DUPLEX), chance.randbytes(_DUPLEX)
    got: dict[str, bytes] = {}

    async def receive(name: str, channel: ReceiveChannel) -> None:
        got[name] = await receive_some_of(channel, _DUPLEX)

    async with opened(maker) as ends:
        source, destination = await _both_ways(ends)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive, "there", destination)
            nursery.start_soon(receive, "back", source)
            nursery.start_soon(send_all, source, there)
            nursery.start_soon(send_all, destination, back)
        require_same(got["there"], there)
        require_same(got["back"], back)


@promise
async def check_waiting_for_an_answer_hinders_no_sender(maker: Maker) -> None:
    """A side that waits for an answer, and is cancelled, or gets it, can send all the while."""
    async with opened(maker) as ends:
        source, destination = await _both_ways(ends)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive_some_of, source, 1)
            await trio.testing.wait_all_tasks_blocked(0.02)
            await send_all(source, b"question")
            got = await receive_some_of(destination, len(b"question"))
            require(got == b"question", "what was sent while a receive waited did not arrive as it was")
            nursery.cancel_scope.cancel()
        await send_all(destination, b"answer")
        got = await receive_some_of(source, len(b"answer"))
        require(got == b"answer", "what came after a cancelled receive did not arrive as it was")
