"""A channel that breaks one promise fails the suite, at the check of that promise and for that reason."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import trio

from kvmmig.errors import ChannelBroken, ChannelClosed
from kvmmig.migration.transport import Channel
from kvmmig.testing import (
    CHECKS,
    CLOGGED_CHECKS,
    STREAM_CHECKS,
    Check,
    Ends,
    Nonconformance,
    memory_channel_pair,
    stream_ends,
)


class Passing(Channel):
    """Does what the channel below it does."""

    def __init__(self, below: Channel) -> None:
        self.below = below

    async def send_some(self, buffers: Sequence[memoryview]) -> int:
        return await self.below.send_some(buffers)

    async def receive_some(self, buffer: memoryview) -> int:
        return await self.below.receive_some(buffer)

    async def flush(self) -> None:
        await self.below.flush()

    def abort(self) -> None:
        self.below.abort()

    async def aclose(self) -> None:
        await self.below.aclose()


class CancelledAfterSending(Passing):
    async def send_some(self, buffers: Sequence[memoryview]) -> int:
        with trio.CancelScope(shield=True):
            accepted = await super().send_some(buffers)
        await trio.lowlevel.checkpoint()
        return accepted


class CancelledAfterReceiving(Passing):
    async def receive_some(self, buffer: memoryview) -> int:
        with trio.CancelScope(shield=True):
            count = await super().receive_some(buffer)
        await trio.lowlevel.checkpoint()
        return count


class NeverACheckpoint(Passing):
    """Never lets another task run: easily done where the sink is always ready."""

    def __init__(self, below: Channel) -> None:
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


class Boasting(Passing):
    async def send_some(self, buffers: Sequence[memoryview]) -> int:
        return await super().send_some(buffers) + 1


class SkippingEmptySends(Passing):
    async def send_some(self, buffers: Sequence[memoryview]) -> int:
        with trio.move_on_after(0.05):
            return await super().send_some(buffers)
        return 0


class Reordering(Passing):
    async def send_some(self, buffers: Sequence[memoryview]) -> int:
        return await super().send_some(buffers[::-1])


class Queueing(Passing):
    """Makes a second task wait instead of telling it."""

    def __init__(self, below: Channel) -> None:
        super().__init__(below)
        self.lock = trio.Lock()

    async def send_some(self, buffers: Sequence[memoryview]) -> int:
        async with self.lock:
            return await super().send_some(buffers)


class EndsByRaising(Passing):
    async def receive_some(self, buffer: memoryview) -> int:
        count = await super().receive_some(buffer)
        if count == 0:
            raise ChannelBroken("that was all")
        return count


class SilentWhenClosed(Passing):
    async def send_some(self, buffers: Sequence[memoryview]) -> int:
        try:
            return await super().send_some(buffers)
        except ChannelClosed:
            return len(buffers[0])


class SilentWhenBroken(Passing):
    async def send_some(self, buffers: Sequence[memoryview]) -> int:
        try:
            return await super().send_some(buffers)
        except ChannelBroken:
            await trio.lowlevel.checkpoint()
            return len(buffers[0])


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
        (SilentWhenBroken, "dead_receiver_is_noticed", "raised nothing; it must raise ChannelBroken"),
    ],
)
async def test_a_broken_channel_fails(broken: type[Passing], check: str, reason: str) -> None:
    async def make() -> Ends:
        sender, receiver = memory_channel_pair(capacity=1 << 20)
        return stream_ends(broken(sender), broken(receiver))

    with pytest.raises(Nonconformance, match=reason):
        await _check(check)(make)


@pytest.mark.parametrize("check", [*CHECKS, *STREAM_CHECKS, *CLOGGED_CHECKS])
async def test_what_only_passes_on_passes(check: Check) -> None:
    async def make() -> Ends:
        sender, receiver = memory_channel_pair()
        return stream_ends(Passing(sender), Passing(receiver))

    await check(make)


def _check(name: str) -> Check:
    return next(c for c in (*CHECKS, *STREAM_CHECKS, *CLOGGED_CHECKS) if c.__name__ == f"check_{name}")
