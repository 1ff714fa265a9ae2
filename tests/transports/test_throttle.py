"""``throttle+``: how much later, and how much at a time.

Latency passes on trio's mock clock. A rate is measured, by lower bounds: no slow host breaks them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from kvmmig.errors import BadURI, ChannelBroken, ChannelClosed, KnobError
from kvmmig.testing import memory_channel_pair
from kvmmig.transport import Channel, PassingChannel, Side, Transport, TransportURI, Wrapper
from kvmmig.transport.contract import find_knob
from tests.transports.using import receive_exactly, send_all

Make = Callable[[str | TransportURI], Transport]


@asynccontextmanager
async def _wrapped(transport: Make, below: Channel, options: str) -> AsyncIterator[Channel]:
    wrapper = transport(f"throttle+tcp:127.0.0.1:1?{options}")
    assert isinstance(wrapper, Wrapper)
    async with wrapper.wrap(below, side=Side.SOURCE) as wrapped:
        assert isinstance(wrapped, Channel)
        yield wrapped


def _standing(channel: Channel) -> dict[str, str]:
    return {name: knob.value() for name, knob in channel.knobs.items()}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("throttle.rate=fast", "'fast' is not a rate"),
        ("throttle.rate=0", "a rate of 0 would never end"),
        ("throttle.latency=soon", "'soon' is not a duration"),
        ("throttle.speed=1", "throttle has no option 'speed'; it knows rate, latency, jitter"),
        ("rate=1MB", "tcp has no option 'rate'"),
    ],
)
def test_what_is_not_understood_is_one_sentence(options: str, sentence: str, transport: Make) -> None:
    with pytest.raises(BadURI, match=sentence):
        transport(f"throttle+tcp:127.0.0.1:1?{options}")


@pytest.mark.parametrize("side", ["sending", "receiving"])
async def test_no_more_than_the_rate_passes(side: str, transport: Make) -> None:
    sender: Channel
    receiver: Channel
    sender, receiver = memory_channel_pair(capacity=1 << 20)
    async with _wrapped(
        transport, sender if side == "sending" else receiver, "throttle.rate=1MB/s"
    ) as limited:
        sender, receiver = (limited, receiver) if side == "sending" else (sender, limited)
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_all, sender, bytes(200_000))
            await receive_exactly(receiver, 200_000)
        assert trio.current_time() - began >= 0.17, "200 kB take 0.2 s, of which 20 ms may come at once"


async def test_a_slow_rate_gets_on_though_each_call_is_cancelled_early(transport: Make) -> None:
    """As the migration's steps are."""
    sender, receiver = memory_channel_pair()
    async with _wrapped(transport, sender, "throttle.rate=200B/s") as slow:
        accepted = 0
        with trio.fail_after(60):
            while accepted < 10:
                with trio.move_on_after(0.002):
                    accepted += await slow.send_some([memoryview(bytes(10))])
        assert await receive_exactly(receiver, accepted) == bytes(accepted)


async def test_every_byte_comes_so_much_later_and_in_order(transport: Make, autojump_clock: object) -> None:
    sender, receiver = memory_channel_pair()
    async with _wrapped(transport, sender, "throttle.latency=20ms&throttle.jitter=20ms") as late:
        began = trio.current_time()
        data = bytes(range(100))
        for value in data:
            await late.send_some([memoryview(bytes([value]))])
        assert await receive_exactly(receiver, len(data)) == data
        assert 0.02 <= trio.current_time() - began <= 0.041


async def test_flush_waits_for_what_is_on_its_way(transport: Make, autojump_clock: object) -> None:
    sender, receiver = memory_channel_pair()
    async with _wrapped(transport, sender, "throttle.latency=50ms") as late:
        began = trio.current_time()
        await late.send_some([memoryview(b"x")])
        await late.flush()
        assert await receive_exactly(receiver, 1) == b"x"
        assert trio.current_time() - began == pytest.approx(0.05, abs=0.001)


async def test_what_is_received_is_late_too_and_so_is_the_end(
    transport: Make, autojump_clock: object
) -> None:
    sender, receiver = memory_channel_pair()
    async with _wrapped(transport, receiver, "throttle.latency=30ms") as late:
        await send_all(sender, b"data")
        await sender.aclose()
        began = trio.current_time()
        assert await receive_exactly(late, 4) == b"data"
        assert await late.receive_some(memoryview(bytearray(1))) == 0
        assert trio.current_time() - began == pytest.approx(0.03, abs=0.001)


async def test_what_is_on_its_way_is_bounded(transport: Make, autojump_clock: object) -> None:
    sender, _ = memory_channel_pair()
    async with _wrapped(transport, sender, "throttle.latency=1h&throttle.rate=1000MB/s") as late:
        late = late.below  # type: ignore[attr-defined]  # without the rate, so as not to wait
        late._out._most = 5 << 20
        accepted = 0
        with trio.move_on_after(0.2) as clogged:
            while True:
                count = await late.send_some([memoryview(bytes(3 << 20))])
                assert count
                accepted += count
        assert clogged.cancelled_caught
        assert accepted == 5 << 20
        late.abort()


async def test_an_error_comes_with_the_next_call(transport: Make) -> None:
    sender, receiver = memory_channel_pair()
    async with _wrapped(transport, sender, "throttle.latency=1ms") as late:
        receiver.abort()
        with pytest.raises(ChannelBroken, match="the other side has closed it"), trio.fail_after(60):
            await send_all(late, bytes(100 << 20))
        with pytest.raises(ChannelBroken):
            await late.aclose()
        with pytest.raises(ChannelClosed):
            await late.flush()


async def test_its_knobs_can_be_turned_while_it_runs(transport: Make) -> None:
    below, receiver = memory_channel_pair(capacity=1 << 20)
    async with _wrapped(transport, below, "throttle.rate=1kB/s&throttle.latency=1ms") as sender:
        assert _standing(sender) == {
            "throttle.rate": "1 kB/s",
            "throttle.latency": "1 ms",
            "throttle.jitter": "0 s",
        }
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(send_all, sender, bytes(100_000))
                await receive_exactly(receiver, 1)
                sender.knobs["throttle.rate"].turn("none")
                await receive_exactly(receiver, 99_999)  # would take 100 s
        sender.knobs["throttle.latency"].turn("2ms")
        assert _standing(sender)["throttle.latency"] == "2 ms"
        sender.abort()


@pytest.mark.parametrize(
    ("knob", "value", "sentence"),
    [
        ("throttle.rate", "fast", "throttle.rate: 'fast' is not a rate.*; none is no limit"),
        ("throttle.rate", "0", "a rate of 0 would never end"),
        ("throttle.speed", "1", r"no 'throttle.speed' to turn here; there are throttle.rate \(1 MB/s\)"),
    ],
)
async def test_a_knob_that_makes_no_sense_changes_nothing(
    knob: str, value: str, sentence: str, transport: Make
) -> None:
    async with _wrapped(transport, memory_channel_pair()[0], "throttle.rate=1MB/s") as channel:
        with pytest.raises(KnobError, match=sentence):
            find_knob(channel.knobs, knob).turn(value)
        assert _standing(channel) == {"throttle.rate": "1 MB/s"}


class _OddSender(PassingChannel):
    """Raises what no channel may, as soon as it is used."""

    async def send_some(self, buffers: Sequence[memoryview]) -> int:
        raise ZeroDivisionError("odd")


class _OddReceiver(PassingChannel):
    async def receive_some(self, buffer: memoryview) -> int:
        raise SystemExit("odd")


async def test_what_ever_the_channel_below_raises_is_an_error_of_the_next_call(transport: Make) -> None:
    async with _wrapped(transport, _OddSender(memory_channel_pair()[0]), "throttle.latency=1ms") as late:
        with pytest.raises(ChannelBroken, match="ZeroDivisionError: odd"), trio.fail_after(60):
            await send_all(late, bytes(100 << 20))
        late.abort()
    async with _wrapped(transport, _OddReceiver(memory_channel_pair()[0]), "throttle.latency=1ms") as late:
        with pytest.raises(ChannelBroken, match="SystemExit: odd"), trio.fail_after(60):
            await late.receive_some(memoryview(bytearray(1)))
        late.abort()


async def test_what_the_block_raises_comes_out_as_it_is(transport: Make) -> None:
    with pytest.raises(ZeroDivisionError):  # noqa: PT012 - it is the block that fails
        async with _wrapped(transport, memory_channel_pair()[0], "throttle.latency=1h") as late:
            await late.send_some([memoryview(b"never to arrive")])
            raise ZeroDivisionError


async def test_leaving_the_block_delivers_what_is_on_its_way(transport: Make) -> None:
    sender, receiver = memory_channel_pair()
    async with _wrapped(transport, sender, "throttle.latency=20ms") as late:
        await late.send_some([memoryview(b"x")])
    assert await receive_exactly(receiver, 1) == b"x"
    assert await receiver.receive_some(memoryview(bytearray(1))) == 0
