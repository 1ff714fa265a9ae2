"""A channel that breaks one promise fails the suite, at the check of that promise and for that reason."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager

import pytest
import trio

from kvmmig.errors import ChannelBroken, ChannelClosed
from kvmmig.testing import (
    CHECKS,
    CLOGGED_CHECKS,
    STREAM_CHECKS,
    Call,
    Check,
    Ends,
    MemoryTransport,
    Nonconformance,
    Plan,
    _ends,
    check_plan,
    conformance,
    memory_channel_pair,
    stream_ends,
)
from kvmmig.transport import AnyChannel, PassingChannel, TransportURI


class CancelledAfterSending(PassingChannel):
    async def send_some(self, buffers: Sequence[memoryview]) -> int:
        with trio.CancelScope(shield=True):
            accepted = await super().send_some(buffers)
        await trio.lowlevel.checkpoint()
        return accepted


class CancelledAfterReceiving(PassingChannel):
    async def receive_some(self, buffer: memoryview) -> int:
        with trio.CancelScope(shield=True):
            count = await super().receive_some(buffer)
        await trio.lowlevel.checkpoint()
        return count


class NeverACheckpoint(PassingChannel):
    """Never lets another task run: easily done where the sink is always ready."""

    def __init__(self, below: AnyChannel) -> None:
        super().__init__(below)
        self.held: list[bytes] = []

    async def send_some(self, buffers: Sequence[memoryview]) -> int:
        self.held += [bytes(buffer) for buffer in buffers]
        return sum(len(buffer) for buffer in buffers)

    async def aclose(self) -> None:
        data = memoryview(b"".join(self.held))
        self.held.clear()
        while data:
            data = data[await super().send_some([data]) :]
        await super().aclose()


class Boasting(PassingChannel):
    async def send_some(self, buffers: Sequence[memoryview]) -> int:
        return await super().send_some(buffers) + 1


class SkippingEmptySends(PassingChannel):
    async def send_some(self, buffers: Sequence[memoryview]) -> int:
        with trio.move_on_after(0.05):
            return await super().send_some(buffers)
        return 0


class Reordering(PassingChannel):
    async def send_some(self, buffers: Sequence[memoryview]) -> int:
        return await super().send_some(buffers[::-1])


class Queueing(PassingChannel):
    """Makes a second task wait instead of telling it."""

    def __init__(self, below: AnyChannel) -> None:
        super().__init__(below)
        self.lock = trio.Lock()

    async def send_some(self, buffers: Sequence[memoryview]) -> int:
        async with self.lock:
            return await super().send_some(buffers)


class EndsByRaising(PassingChannel):
    async def receive_some(self, buffer: memoryview) -> int:
        count = await super().receive_some(buffer)
        if count == 0:
            raise ChannelBroken("that was all")
        return count


class SilentWhenClosed(PassingChannel):
    async def send_some(self, buffers: Sequence[memoryview]) -> int:
        try:
            return await super().send_some(buffers)
        except ChannelClosed:
            return len(buffers[0])


class SilentWhenBroken(PassingChannel):
    async def send_some(self, buffers: Sequence[memoryview]) -> int:
        try:
            return await super().send_some(buffers)
        except ChannelBroken:
            await trio.lowlevel.checkpoint()
            return len(buffers[0])


class FlushingNothing(PassingChannel):
    """Keeps what it has accepted until there is more, or the end."""

    def __init__(self, below: AnyChannel) -> None:
        super().__init__(below)
        self.kept: list[memoryview] = []

    async def send_some(self, buffers: Sequence[memoryview]) -> int:
        await self.pass_on()
        await trio.lowlevel.checkpoint()
        self.kept = [self.keep(buffers[0][: 1 << 20])]
        return len(self.kept[0])

    def keep(self, data: memoryview) -> memoryview:
        return memoryview(bytes(data))

    async def pass_on(self) -> None:
        while self.kept:
            if rest := self.kept[0][await super().send_some(self.kept) :]:
                self.kept = [rest]
            else:
                self.kept = []

    async def aclose(self) -> None:
        await self.pass_on()
        await super().aclose()


class FlushingTooLate(FlushingNothing):
    """Reads the sender's buffers again after it has said that it does not."""

    def keep(self, data: memoryview) -> memoryview:
        return data

    async def flush(self) -> None:
        await trio.lowlevel.checkpoint()
        trio.lowlevel.spawn_system_task(self.pass_on)


class TakingAll(PassingChannel):
    async def send_some(self, buffers: Sequence[memoryview]) -> int:
        await super().send_some(buffers)
        return sum(len(buffer) for buffer in buffers)


class HoldingTheLoop(PassingChannel):
    async def send_some(self, buffers: Sequence[memoryview]) -> int:
        time.sleep(0.3)  # noqa: ASYNC251 - that is what is wrong with it
        return await super().send_some(buffers)


class LeavingADescriptor(PassingChannel):
    def __init__(self, below: AnyChannel) -> None:
        super().__init__(below)
        left_open.append(os.open("/dev/null", os.O_RDONLY))


left_open: list[int] = []


@pytest.fixture
def no_patience(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What will never come is not waited for long."""
    monkeypatch.setattr(conformance, "_FLUSH_PATIENCE", 0.2)
    monkeypatch.setattr(conformance, "_GONE", 0.2)
    monkeypatch.setattr(_ends, "PATIENCE", 5.0)
    yield
    while left_open:
        os.close(left_open.pop())


@pytest.mark.usefixtures("no_patience")
@pytest.mark.parametrize(
    ("broken", "check", "reason"),
    [
        (CancelledAfterSending, "cancelled_send_accepts_nothing", "8 bytes were accepted, 17 arrived"),
        (CancelledAfterSending, "cancelled_calls_move_nothing", "bytes were accepted, .* arrived"),
        (CancelledAfterReceiving, "cancelled_calls_move_nothing", "bytes were accepted, .* arrived"),
        (NeverACheckpoint, "calls_are_checkpoints", "send_some returned without a checkpoint"),
        (NeverACheckpoint, "cancelled_send_accepts_nothing", "send_some ignored a cancel"),
        (Boasting, "bytes_arrive_in_order", "was offered .* and says it took"),
        (SkippingEmptySends, "abort_frees_a_clogged_sender", "says it took 0"),
        (Reordering, "bytes_arrive_in_order", "bytes that arrived differ"),
        (Queueing, "clogged_sender_can_be_cancelled", "a second send_some .* raised"),
        (EndsByRaising, "end_of_stream_is_zero", "ChannelBroken"),
        (SilentWhenClosed, "closing_is_idempotent", "send_some on a closed channel raised nothing"),
        (FlushingNothing, "flush_means_delivered", "only 0 of 20000 bytes arrive while the sender rests"),
        (FlushingTooLate, "flush_means_delivered", "bytes that arrived differ .* from 0 on"),
        (TakingAll, "no_call_holds_the_loop", "took 268435456 bytes at once, which holds the event loop"),
        (HoldingTheLoop, "no_call_holds_the_loop", "held 5 times for more than 0.25 s"),
        (LeavingADescriptor, "abort_leaves_nothing", "abort has left behind: descriptor .*/dev/null"),
        (SilentWhenBroken, "dead_receiver_is_noticed", "raised nothing; it must raise ChannelBroken"),
    ],
)
async def test_a_broken_channel_fails(broken: type[PassingChannel], check: str, reason: str) -> None:
    @asynccontextmanager
    async def make() -> AsyncIterator[Ends]:
        sender, receiver = memory_channel_pair(capacity=1 << 20)
        yield stream_ends(broken(sender), broken(receiver))

    with pytest.raises(Nonconformance, match=reason):
        await _check(check)(make)


async def test_a_plan_finds_a_cancelled_call_that_moved_bytes() -> None:
    @asynccontextmanager
    async def make() -> AsyncIterator[Ends]:
        sender, receiver = memory_channel_pair()
        yield stream_ends(CancelledAfterSending(sender), receiver)

    plan = Plan(sends=(Call((100,), 0), Call((7,), None)), receives=())
    with pytest.raises(Nonconformance, match="7 bytes were accepted, 107 arrived"):
        await check_plan(make, plan)


def _check(name: str) -> Check:
    return next(c for c in (*CHECKS, *STREAM_CHECKS, *CLOGGED_CHECKS) if c.__name__ == f"check_{name}")


@pytest.mark.parametrize("check", [*CHECKS, *STREAM_CHECKS, *CLOGGED_CHECKS])
async def test_good(check: Check) -> None:
    await check(lambda: MemoryTransport(TransportURI("memory", "a")))
