"""The base of wrappers that re-frame: frames below, with a cap, and the same bytes at the other end."""

from __future__ import annotations

import random
import struct
import threading
import zlib
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import pytest
import trio
from hypothesis import HealthCheck, given, settings

from kvmmig.errors import ChannelBroken, ChannelClosed
from kvmmig.testing import (
    CHECKS,
    Check,
    Ends,
    Plan,
    check_plan,
    memory_channel_pair,
    plans,
    stream_ends,
)
from kvmmig.testing._transfer import receive_all, send_all
from kvmmig.transport import AnyChannel, Channel, Knob, Side
from kvmmig.transport.guard import GuardedChannel
from kvmmig.transport.toolkit.reframing import reframed


def encode(data: bytes | bytearray) -> bytes:
    return zlib.crc32(data).to_bytes(4, "big") + data


def decode(frame: bytes | bytearray) -> memoryview:
    if zlib.crc32(memoryview(frame)[4:]) != int.from_bytes(frame[:4], "big"):
        raise ValueError("its checksum is wrong")
    return memoryview(frame)[4:]


def wrapped(below: AnyChannel, side: Side) -> AbstractAsyncContextManager[AnyChannel]:
    return reframed(below, encode, decode, side=side, name="sum", frame_size=1 << 16)


@asynccontextmanager
async def both() -> AsyncIterator[tuple[Channel, Channel]]:
    there, here = memory_channel_pair()
    async with wrapped(there, Side.SOURCE) as sender, wrapped(here, Side.DESTINATION) as receiver:
        assert isinstance(sender, Channel)
        assert isinstance(receiver, Channel)
        yield sender, receiver


@asynccontextmanager
async def ends() -> AsyncIterator[Ends]:
    async with both() as (sender, receiver):
        yield stream_ends(sender, receiver)


@pytest.mark.parametrize("check", CHECKS)
async def test_the_suite(check: Check) -> None:
    await check(ends)


@given(plan=plans())
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
async def test_any_plan_of_cancels(plan: Plan) -> None:
    await check_plan(ends, plan)


class OneWay(GuardedChannel):
    """As the guard makes it of a channel that goes one way."""

    @property
    def two_way(self) -> bool:
        return False


async def test_it_goes_the_ways_that_below_goes() -> None:
    there, here = memory_channel_pair()
    data = random.Random(1).randbytes(300_000)
    async with (
        wrapped(OneWay(there, "there"), Side.SOURCE) as sender,
        wrapped(OneWay(here, "here"), Side.DESTINATION) as receiver,
        trio.open_nursery() as nursery,
    ):
        assert isinstance(sender, Channel)
        assert isinstance(receiver, Channel)
        assert not sender.two_way
        assert not receiver.two_way

        async def send() -> None:
            await send_all(sender, data)
            await sender.aclose()

        nursery.start_soon(send)
        assert await receive_all(receiver) == data


async def test_what_is_flushed_is_all_below() -> None:
    there, here = memory_channel_pair()
    async with wrapped(there, Side.SOURCE) as sender:
        assert isinstance(sender, Channel)
        await sender.send_some([memoryview(b"a"), memoryview(b"bc")])
        await sender.flush()
        buffer = bytearray(100)
        count = await here.receive_some(memoryview(buffer))
        assert buffer[:count] == struct.pack(">I", 7) + encode(b"abc")
        assert sender.counters() == {"sum.sent-bytes": 11, "sum.received-bytes": 0}


@pytest.mark.parametrize(
    ("bytes_below", "sentence"),
    [
        (struct.pack(">I", 3) + b"ab", "ended inside of a frame"),
        (b"\0\0", "ended inside of a frame"),
        (
            struct.pack(">I", 5) + b"12345",
            r"sum\+ can't decode what goes from memory/a: its checksum is wrong",
        ),
        (b"\xff\xff\xff\xff", r"a frame of 4294967295 bytes, and sum\+ takes 135168"),
    ],
)
async def test_what_is_no_frame_breaks_the_channel(bytes_below: bytes, sentence: str) -> None:
    there, here = memory_channel_pair()
    async with wrapped(here, Side.DESTINATION) as receiver:
        assert isinstance(receiver, Channel)
        await there.send_some([memoryview(bytes_below)])
        await there.aclose()
        for _ in range(2):
            with pytest.raises(ChannelBroken, match=sentence):
                await receiver.receive_some(memoryview(bytearray(10)))
        receiver.abort()


async def test_a_frame_may_decode_to_nothing_without_ending_the_stream() -> None:
    there, here = memory_channel_pair()
    async with wrapped(here, Side.DESTINATION) as receiver:
        assert isinstance(receiver, Channel)
        for piece in (b"", b"a"):
            frame = encode(piece)
            await there.send_some([memoryview(struct.pack(">I", len(frame)) + frame)])
        buffer = bytearray(10)
        assert await receiver.receive_some(memoryview(buffer)) == 1
        receiver.abort()


async def test_what_is_encoded_does_not_change_meanwhile_and_is_encoded_off_the_loop() -> None:
    begun, changed, threads = threading.Event(), threading.Event(), []

    def slowly(data: bytes | bytearray) -> bytes:
        threads.append(threading.current_thread())
        begun.set()
        changed.wait(10)
        return encode(data)

    there, here = memory_channel_pair()
    memory = bytearray(b"x" * 50_000)
    async with reframed(there, slowly, decode, side=Side.SOURCE, name="slow") as sender:
        assert isinstance(sender, Channel)
        assert await sender.send_some([memoryview(memory)]) == len(memory)
        await trio.to_thread.run_sync(begun.wait)
        memory[:] = bytes(len(memory))
        changed.set()
        async with wrapped(here, Side.DESTINATION) as receiver:
            assert isinstance(receiver, Channel)
            buffer = bytearray(60_000)
            assert await receiver.receive_some(memoryview(buffer)) == 50_000
            assert buffer[:50_000] == b"x" * 50_000
        sender.abort()
    assert threads[0] is not threading.current_thread()


async def test_an_error_below_is_passed_on_as_it_is() -> None:
    async with both() as (sender, receiver):
        receiver.abort()
        with pytest.raises(ChannelBroken, match=r"^the memory channel to memory/b is broken: the other side"):
            await send_all(sender, bytes(10 << 20))
        sender.abort()
        with pytest.raises(ChannelClosed):
            await sender.send_some([memoryview(b"a")])


async def test_knobs_notices_counters_and_peer_are_belows() -> None:
    there, _ = memory_channel_pair()
    there.knobs = {"mem.rate": Knob(lambda: "1", lambda text: None)}
    there.notices = ("a fall-back",)
    async with wrapped(there, Side.SOURCE) as sender:
        assert (sender.peer, sender.notices, list(sender.knobs)) == (
            "memory/b",
            ("a fall-back",),
            ["mem.rate"],
        )
