"""``fault+``: each fault strikes where it should, and is what it says."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import trio
import trio.testing

from kvmmig.errors import BadURI, ChannelBroken, KnobError
from kvmmig.testing import memory_channel_pair
from kvmmig.transport import AnyChannel, Channel, Side, Transport, TransportURI
from kvmmig.transport.phases import collecting
from kvmmig_transports.fault import FaultWrapper
from tests.transports.using import receive_exactly, send_all

Make = Callable[[str | TransportURI], Transport]

_DATA = bytes(range(200))


class Faulty:
    """A memory channel whose sending end, or receiving end, has a fault."""

    def __init__(self, transport: Make, options: str) -> None:
        wrapper = transport("fault+tcp:127.0.0.1:1" + (f"?{options}" if options else ""))
        assert isinstance(wrapper, FaultWrapper)
        self.wrapper = wrapper
        self.receives = "receive" in options

    @asynccontextmanager
    async def ends(self) -> AsyncIterator[tuple[Channel, Channel]]:
        sender: AnyChannel
        receiver: AnyChannel
        sender, receiver = memory_channel_pair(capacity=1 << 20)
        side = Side.DESTINATION if self.receives else Side.SOURCE
        async with self.wrapper.wrap(receiver if self.receives else sender, side=side) as faulty:
            sender, receiver = (sender, faulty) if self.receives else (faulty, receiver)
            assert isinstance(sender, Channel)
            assert isinstance(receiver, Channel)
            yield sender, receiver
            faulty.abort()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("fault.what=melt", "what=melt is not understood; write what=cut or what=stall"),
        ("fault.phase=lunch", "write phase=setup or"),
        ("fault.at=x", "'x' is not a size"),
        ("fault.seed=x", "'x' is not a number; use 0 to"),
        ("fault.seed=1&fault.at=0", "there is no byte below 0"),
        ("fault.for=1s&fault.at=1", "cut happens at once; fault.for is for what lasts"),
        ("fault.which=1", "fault has no option 'which'; it knows what, side, at, phase, seed, for"),
    ],
)
def test_what_is_not_understood_is_one_sentence(options: str, sentence: str, transport: Make) -> None:
    with pytest.raises(BadURI, match=sentence):
        transport(f"fault+tcp:127.0.0.1:1?{options}")


@pytest.mark.parametrize("side", ["send", "receive"])
async def test_a_cut_comes_after_exactly_so_many_bytes(side: str, transport: Make) -> None:
    async with Faulty(transport, f"fault.at=100&fault.side={side}").ends() as (sender, receiver):
        if side == "send":
            with pytest.raises(ChannelBroken, match=r"fault\+ cut the connection to memory/b after 100 B"):
                await send_all(sender, _DATA)
            with pytest.raises(ChannelBroken, match="the other side has closed it"):
                await receiver.receive_some(memoryview(bytearray(1)))
        else:
            await send_all(sender, _DATA)
            assert await receive_exactly(receiver, 100) == _DATA[:100]
            with pytest.raises(ChannelBroken, match="after 100 B"):
                await receiver.receive_some(memoryview(bytearray(1)))
        with pytest.raises(ChannelBroken):
            await (sender if side == "send" else receiver).aclose()


@pytest.mark.parametrize("side", ["send", "receive"])
@pytest.mark.parametrize("at", [0, 1, 77, 199])
async def test_one_byte_is_corrupted_and_it_is_that_one(side: str, at: int, transport: Make) -> None:
    async with Faulty(transport, f"fault.what=corrupt&fault.at={at}&fault.side={side}").ends() as (
        sender,
        receiver,
    ):
        await send_all(sender, _DATA)
        await sender.aclose()
        got = await receive_exactly(receiver, len(_DATA))
        assert [i for i in range(200) if got[i] != _DATA[i]] == [at]


async def test_a_stall_lasts_for_its_time_and_nothing_is_lost(transport: Make) -> None:
    async with Faulty(transport, "fault.what=stall&fault.at=50&fault.for=50ms").ends() as (sender, receiver):
        began = trio.current_time()
        for start in range(0, 200, 10):
            done = False
            while not done:
                with trio.move_on_after(0.005):  # as the migration's steps are
                    await send_all(sender, _DATA[start : start + 10])
                    done = True
        assert trio.current_time() - began >= 0.05
        assert await receive_exactly(receiver, len(_DATA)) == _DATA


async def test_a_stall_for_ever_also_holds_flush_and_aclose(transport: Make) -> None:
    async with Faulty(transport, "fault.what=stall&fault.at=0").ends() as (sender, _):
        acts: list[Callable[[], Awaitable[None]]] = [
            lambda: send_all(sender, b"x"),
            sender.flush,
            sender.aclose,
        ]
        for act in acts:
            with trio.move_on_after(0.05) as scope:
                await act()
            assert scope.cancelled_caught


async def test_a_trickle_is_slow_and_gets_on_though_each_call_is_cancelled_early(transport: Make) -> None:
    async with Faulty(transport, "fault.what=trickle&fault.at=100").ends() as (sender, receiver):
        began = trio.current_time()
        accepted = 0
        with trio.fail_after(20):
            while accepted < 110:
                with trio.move_on_after(0.005):
                    accepted += await sender.send_some([memoryview(_DATA)[accepted:]])
        assert trio.current_time() - began >= 0.05, "ten bytes at 100 a second, of which two may come at once"
        assert await receive_exactly(receiver, accepted) == _DATA[:accepted]


async def test_a_trickle_that_is_over_leaves_no_debt(transport: Make) -> None:
    options = "fault.what=trickle&fault.at=100000&fault.for=20ms"
    async with Faulty(transport, options).ends() as (sender, receiver), trio.open_nursery() as nursery:
        nursery.start_soon(send_all, sender, _DATA * 1000)
        with trio.fail_after(10):
            assert await receive_exactly(receiver, 200_000) == _DATA * 1000


async def test_short_accepts_are_short(transport: Make) -> None:
    async with Faulty(transport, "fault.what=short&fault.at=0").ends() as (sender, _):
        counts = [await sender.send_some([memoryview(bytes(100_000))]) for _ in range(50)]
        assert max(counts) <= 100
        assert len(set(counts)) > 10


async def test_a_seed_chooses_one_byte_and_always_that(transport: Make) -> None:
    async def passed(seed: int) -> int:
        async with Faulty(transport, f"fault.seed={seed}&fault.at=100000").ends() as (sender, _):
            count = 0
            try:
                while True:
                    count += await sender.send_some([memoryview(bytes(100))])
            except ChannelBroken:
                return count

    assert [await passed(1), await passed(2)] == [await passed(1), await passed(2)]
    assert await passed(1) != await passed(2)


async def test_it_counts_from_a_phase_on(transport: Make) -> None:
    phases: list[Callable[[str], None]] = []
    async with AsyncExitStack() as stack:
        with collecting(phases):
            ends = Faulty(transport, "fault.phase=final&fault.at=10").ends()
            sender, _ = await stack.enter_async_context(ends)
        (enter_phase,) = phases
        await send_all(sender, _DATA)
        enter_phase("rounds")
        await send_all(sender, _DATA)
        enter_phase("final")
        await send_all(sender, _DATA[:10])
        with pytest.raises(ChannelBroken):
            await send_all(sender, _DATA)


async def test_it_strikes_when_it_is_armed_also_who_waits(transport: Make) -> None:
    faulty = Faulty(transport, "")
    async with faulty.ends() as (sender, _):
        async with trio.open_nursery() as nursery:

            async def clogged() -> None:
                with pytest.raises(ChannelBroken, match=r"fault\+ cut"), trio.fail_after(20):
                    await send_all(sender, bytes(2 << 20))

            nursery.start_soon(clogged)
            await trio.testing.wait_all_tasks_blocked()
            faulty.wrapper.arm()
        async with faulty.ends() as (later, _):
            with pytest.raises(ChannelBroken):
                await send_all(later, b"x")


async def test_a_stall_that_is_armed_holds_who_waits(transport: Make) -> None:
    faulty = Faulty(transport, "fault.what=stall")
    async with faulty.ends() as (sender, receiver):
        await send_all(sender, bytes(1 << 20))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_all, sender, b"more")
            await trio.testing.wait_all_tasks_blocked()
            faulty.wrapper.arm()
            await receive_exactly(receiver, 1 << 20)
            with trio.move_on_after(0.05) as nothing_more:
                await receiver.receive_some(memoryview(bytearray(1)))
            assert nothing_more.cancelled_caught
            nursery.cancel_scope.cancel()


async def test_a_person_strikes_and_ends_it_by_a_knob(transport: Make) -> None:
    async with Faulty(transport, "").ends() as (sender, receiver):
        assert sender.knobs["fault.strike"].value() == "none"
        with trio.fail_after(10):
            await send_all(sender, _DATA)
            sender.knobs["fault.strike"].turn("stall")
            assert sender.knobs["fault.strike"].value() == "stall"
            async with trio.open_nursery() as nursery:
                nursery.start_soon(send_all, sender, _DATA)
                await trio.testing.wait_all_tasks_blocked()
                sender.knobs["fault.strike"].turn("none")
            assert await receive_exactly(receiver, 2 * len(_DATA)) == _DATA * 2
        with pytest.raises(KnobError, match="'fire' is no fault; there are cut, stall, trickle, short, "):
            sender.knobs["fault.strike"].turn("fire")
        sender.knobs["fault.strike"].turn("cut")
        with pytest.raises(ChannelBroken, match="cut the connection"):
            await send_all(sender, _DATA)
