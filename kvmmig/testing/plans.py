"""Cancels at any moment: plans of calls, which hypothesis thinks up and shrinks, and the check that runs one.

``pip install hypothesis``, and then::

    @given(plan=plans())
    @settings(deadline=None)
    async def test_any_plan(plan):
        await check_plan(tcp_ends, plan)
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from kvmmig.testing._ends import Maker, one_sentence, opened
from kvmmig.testing._transfer import offer, require_same, transfer
from kvmmig.transport import ReceiveChannel, SendChannel

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

_LARGEST = 3 << 20
_MOST_CALLS = 20


@dataclass(frozen=True)
class Call:
    """One call: the sizes of its buffers in bytes, and when it is cancelled."""

    sizes: tuple[int, ...]
    #: Before it begins (0), after so many turns of the event loop, or never (None).
    cancelled_after: int | None


@dataclass(frozen=True)
class Plan:
    """What the two ends do. A receiver that has used up its calls goes on without cancels."""

    sends: tuple[Call, ...]
    receives: tuple[Call, ...]


def plans() -> SearchStrategy[Plan]:
    """Any plan, for hypothesis, which must be installed."""
    from hypothesis import strategies as st

    size = st.one_of(st.integers(1, 100), st.integers(1, _LARGEST))
    cancelled = st.one_of(st.none(), st.integers(0, 5))

    def calls(most_buffers: int) -> SearchStrategy[tuple[Call, ...]]:
        sizes = st.lists(size, min_size=1, max_size=most_buffers).map(tuple)
        return st.lists(st.builds(Call, sizes, cancelled), max_size=_MOST_CALLS).map(tuple)

    return st.builds(Plan, calls(4), calls(1))


async def check_plan(maker: Maker, plan: Plan) -> None:
    """Whatever is cancelled, and when: the bytes that arrive are exactly those that were accepted."""
    data = random.Random(4).randbytes(sum(sum(call.sizes) for call in plan.sends))
    view = memoryview(data)
    accepted = 0

    async def sending(sender: SendChannel) -> None:
        nonlocal accepted
        for call in plan.sends:
            buffers, start = [], accepted
            for size in call.sizes:
                buffers.append(view[start : start + size])
                start += size
            async with _cancelled(call):
                accepted += await offer(sender, buffers)

    async def receiving(receiver: ReceiveChannel) -> bytes:
        got = bytearray()
        calls = iter(plan.receives)
        count = -1
        while count:
            call = next(calls, Call((1 << 20,), None))
            buffer = memoryview(bytearray(call.sizes[0]))
            count = -1
            async with _cancelled(call):
                count = await receiver.receive_some(buffer)
                got += buffer[:count]
        return bytes(got)

    with one_sentence("what arrives is what was accepted, whatever is cancelled"):
        async with opened(maker) as ends:
            got, _ = await transfer(ends, sending, receiving)
            require_same(got, data[:accepted])


@asynccontextmanager
async def _cancelled(call: Call) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:

        async def cancel(turns: int) -> None:
            for _ in range(turns):
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()

        if call.cancelled_after == 0:
            nursery.cancel_scope.cancel()
        elif call.cancelled_after is not None:
            nursery.start_soon(cancel, call.cancelled_after)
        yield
        nursery.cancel_scope.cancel()
