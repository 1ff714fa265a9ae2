"""A channel for a library that has ``send_all`` only: what is accepted, and when."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, given, settings

from kvmmig.errors import ChannelBroken, ChannelClosed
from kvmmig.testing import (
    CHECKS,
    Check,
    Ends,
    Maker,
    Plan,
    check_plan,
    plans,
    stream_ends,
)
from kvmmig.transport.toolkit.pumped import pumped_channel, pumped_receiver, pumped_sender


def pair() -> tuple[trio.SocketStream, trio.SocketStream]:
    ours, theirs = trio.socket.socketpair()
    return trio.SocketStream(ours), trio.SocketStream(theirs)


@asynccontextmanager
async def two_way() -> AsyncIterator[Ends]:
    ours, theirs = pair()
    async with (
        pumped_channel(ours.send_all, ours.receive_some, peer="there", close=ours.aclose) as sender,
        pumped_channel(theirs.send_all, theirs.receive_some, peer="here", close=theirs.aclose) as receiver,
    ):
        yield stream_ends(sender, receiver)


@asynccontextmanager
async def one_way() -> AsyncIterator[Ends]:
    ours, theirs = pair()
    async with (
        pumped_sender(ours.send_all, peer="there", close=ours.aclose, abort=ours.socket.close) as sender,
        pumped_receiver(theirs.receive_some, peer="here", abort=theirs.socket.close) as receiver,
    ):
        yield stream_ends(sender, receiver)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("maker", [two_way, one_way])
async def test_the_suite(maker: Maker, check: Check) -> None:
    await check(maker)


@given(plan=plans())
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
async def test_any_plan_of_cancels(plan: Plan) -> None:
    await check_plan(two_way, plan)


class Library:
    """Sends when it is told to, and notes what it was given."""

    def __init__(self) -> None:
        self.began: list[bytes] = []
        self.calls: list[str] = []
        self.may_send = trio.Semaphore(0)

    async def send_all(self, data: bytes) -> None:
        self.began.append(data)
        await self.may_send.acquire()
        self.calls.append(f"sent {data!r}")

    async def flush(self) -> None:
        self.calls.append("flush")

    async def close(self) -> None:
        self.calls.append("close")


def data(text: str) -> list[memoryview]:
    return [memoryview(text.encode())]


async def test_a_piece_that_waits_is_taken_back_by_a_cancel() -> None:
    library = Library()
    async with pumped_sender(library.send_all, peer="x") as channel:
        assert await channel.send_some(data("first")) == 5
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(channel.send_some, data("go"))
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()
        for _ in range(2):
            library.may_send.release()
        await channel.send_some(data("cancelled"))
        await channel.flush()
        channel.abort()
    assert library.began == [b"first", b"cancelled"]


async def test_a_piece_is_accepted_when_the_library_has_begun_it() -> None:
    library = Library()
    async with pumped_sender(library.send_all, peer="x") as channel, trio.open_nursery() as nursery:
        accepted = []

        async def send(text: str) -> None:
            await channel.send_some(data(text))
            accepted.append(text)

        await send("first")
        nursery.start_soon(send, "go")
        await trio.testing.wait_all_tasks_blocked()
        assert (accepted, library.began) == (["first"], [b"first"])
        library.may_send.release()
        await trio.testing.wait_all_tasks_blocked()
        assert (accepted, library.began) == (["first", "go"], [b"first", b"go"])
        channel.abort()


async def test_a_close_drains_then_flushes_then_closes() -> None:
    library = Library()
    library.may_send = trio.Semaphore(10)
    async with pumped_sender(library.send_all, peer="x", flush=library.flush, close=library.close) as channel:
        await channel.send_some(data("a"))
        await channel.send_some(data("b"))
    assert library.calls == ["sent b'a'", "sent b'b'", "flush", "close"]


async def test_a_flush_that_is_cancelled_is_done_all_the_same() -> None:
    library = Library()
    async with pumped_sender(library.send_all, peer="x", flush=library.flush) as channel:
        await channel.send_some(data("a"))
        library.may_send.release()
        await channel.flush()
        with trio.CancelScope() as scope:
            scope.cancel()
            await channel.flush()
        assert scope.cancelled_caught
        channel.abort()
    assert library.calls == ["sent b'a'", "flush"]


@pytest.mark.parametrize(
    "problem", [ValueError("no"), SystemExit("no"), ExceptionGroup("g", [ValueError("no")])]
)
async def test_whatever_the_library_raises_breaks_the_channel(problem: BaseException) -> None:
    async def send_all(data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        raise problem

    async with pumped_sender(send_all, peer="x") as channel:
        await channel.send_some(data("a"))
        for _ in range(2):
            with pytest.raises(ChannelBroken, match=r"the connection to x is broken: .*(no|g)") as caught:
                await channel.flush()
            assert caught.value.__cause__ is problem
        channel.abort()


async def test_a_transport_error_of_the_block_comes_out_as_it_is() -> None:
    async def send_all(data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        raise OSError(104, "cut")

    with pytest.raises(ChannelBroken, match="the connection to x is broken: cut"):
        async with pumped_sender(send_all, peer="x") as channel:
            await channel.send_some(data("a"))


async def test_an_error_behind_what_was_received_comes_after_it_and_breaks_both_directions() -> None:
    messages = iter([b"ab", b"c"])

    async def receive() -> bytes:
        await trio.lowlevel.checkpoint()
        return next(messages)

    async with pumped_channel(Library().send_all, receive, peer="x") as channel:
        buffer = bytearray(3)
        assert await channel.receive_some(memoryview(buffer)) == 2
        assert await channel.receive_some(memoryview(buffer)[2:]) == 1
        assert buffer == b"abc"
        with pytest.raises(ChannelBroken, match="RuntimeError"):
            await channel.receive_some(memoryview(buffer))
        with pytest.raises(ChannelBroken, match="RuntimeError"):
            await channel.send_some(data("a"))
        channel.abort()


async def test_after_an_error_of_sending_one_can_still_receive() -> None:
    async def send_all(data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        raise OSError(32, "pipe")

    async def receive() -> bytes:
        await trio.lowlevel.checkpoint()
        return b"refused"

    async with pumped_channel(send_all, receive, peer="x") as channel:
        await channel.send_some(data("a"))
        with pytest.raises(ChannelBroken):
            await channel.flush()
        assert await channel.receive_some(memoryview(bytearray(10))) == 7
        channel.abort()


async def test_an_exception_may_be_the_end() -> None:
    async def receive() -> bytes:
        await trio.lowlevel.checkpoint()
        raise trio.EndOfChannel

    async with pumped_receiver(receive, peer="x", ends=(trio.EndOfChannel,)) as channel:
        assert await channel.receive_some(memoryview(bytearray(1))) == 0
        assert await channel.receive_some(memoryview(bytearray(1))) == 0


async def test_an_abort_cancels_the_library_and_not_the_block() -> None:
    library = Library()
    async with pumped_sender(library.send_all, peer="x") as channel:
        await channel.send_some(data("a"))
        channel.abort()
        await trio.lowlevel.checkpoint()
        with pytest.raises(ChannelClosed):
            await channel.send_some(data("b"))
    assert library.calls == []
