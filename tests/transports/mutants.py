"""Channels that break one promise each, around the channel in memory."""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Sequence
from typing import cast

import trio

from kvmmig.errors import ChannelBroken, ChannelBusy, ChannelClosed, KnobError
from kvmmig.transport import AnyChannel, Knob, PassingChannel


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


class ReadingAfterFlush(FlushingNothing):
    """Reads the sender's buffers again after it has said that it does not."""

    def __init__(self, below: AnyChannel) -> None:
        super().__init__(below)
        self.copies = False

    def keep(self, data: memoryview) -> memoryview:
        return data

    async def flush(self) -> None:
        await trio.lowlevel.checkpoint()


class ClaimingToCopy(ReadingAfterFlush):
    """Reads the sender's buffers until the next call, and says that it copies them."""

    def __init__(self, below: AnyChannel) -> None:
        super().__init__(below)
        self.copies = True

    async def flush(self) -> None:
        await self.pass_on()
        await super().flush()


class TakingAll(PassingChannel):
    """Copies all that is offered, in one go."""

    async def send_some(self, buffers: Sequence[memoryview]) -> int:
        buffers = [memoryview(b"".join(buffers))]
        return await super().send_some(buffers)


class HoldingTheLoop(PassingChannel):
    async def send_some(self, buffers: Sequence[memoryview]) -> int:
        time.sleep(0.03)  # noqa: ASYNC251 - that is what is wrong with it
        return await super().send_some(buffers)


class HoldingTheLoopWhileReceiving(PassingChannel):
    async def receive_some(self, buffer: memoryview) -> int:
        time.sleep(0.03)  # noqa: ASYNC251 - that is what is wrong with it
        return await super().receive_some(buffer)


class LeavingADescriptor(PassingChannel):
    def __init__(self, below: AnyChannel) -> None:
        super().__init__(below)
        left_open.append(os.open("/dev/null", os.O_RDONLY))


left_open: list[int] = []


class NoWayBack(PassingChannel):
    """At the source: nothing can be received, though it says that it is two-way."""

    async def receive_some(self, buffer: memoryview) -> int:
        await trio.lowlevel.checkpoint()
        raise ChannelBroken("nothing comes this way")


class HalfDuplex(PassingChannel):
    """One task at a time for both directions."""

    def __init__(self, below: AnyChannel) -> None:
        super().__init__(below)
        self.lock = trio.Lock()

    async def send_some(self, buffers: Sequence[memoryview]) -> int:
        async with self.lock:
            return await super().send_some(buffers)

    async def receive_some(self, buffer: memoryview) -> int:
        async with self.lock:
            return await super().receive_some(buffer)


class CompressingWithoutBound(PassingChannel):
    """Does well where blocks become small: it sends the rest of one whatever happens."""

    def __init__(self, below: AnyChannel) -> None:
        super().__init__(below)
        self.kept = bytearray()

    async def send_some(self, buffers: Sequence[memoryview]) -> int:
        block = bytes(buffers[0][: 1 << 16])
        await trio.lowlevel.checkpoint()
        packed = memoryview(zlib.compress(block, 1))
        packed = memoryview(len(packed).to_bytes(4, "big") + packed)
        with trio.CancelScope(shield=True):
            while packed:
                packed = packed[await super().send_some([packed]) :]
        return len(block)

    async def receive_some(self, buffer: memoryview) -> int:
        while not self.kept:
            head = await self._read(4)
            if not head:
                return 0
            self.kept += zlib.decompress(await self._read(int.from_bytes(head, "big")))
        count = min(len(buffer), len(self.kept))
        buffer[:count] = self.kept[:count]
        del self.kept[:count]
        await trio.lowlevel.cancel_shielded_checkpoint()
        return count

    async def _read(self, size: int) -> bytes:
        got = bytearray()
        while len(got) < size:
            buffer = memoryview(bytearray(size - len(got)))
            if not (count := await super().receive_some(buffer)):
                break
            got += buffer[:count]
        return bytes(got)


class RaisingAnything(PassingChannel):
    async def flush(self) -> None:
        await trio.lowlevel.checkpoint()
        raise ValueError("no such thing")


class Exiting(PassingChannel):
    async def flush(self) -> None:
        await trio.lowlevel.checkpoint()
        raise SystemExit(3)


class NoBusy(PassingChannel):
    """A second task's call is an error like any other."""

    async def send_some(self, buffers: Sequence[memoryview]) -> int:
        try:
            return await super().send_some(buffers)
        except ChannelBusy as error:
            raise trio.BusyResourceError("busy") from error


class WithKnobs(PassingChannel):
    """One knob, which takes what ``turn`` takes."""

    def __init__(self, below: AnyChannel) -> None:
        super().__init__(below)
        self.rate = "5"
        self.knobs = {"mutant.rate": Knob(lambda: self.rate, self.turn)}

    def turn(self, text: str) -> None:
        if not text.isascii() or not text.isdigit():
            raise KnobError(f"{text!r} is no rate; write a number")
        self.rate = text


class KnobThatTakesAnything(WithKnobs):
    def turn(self, text: str) -> None:
        self.rate = text


class KnobThatRaisesAnything(WithKnobs):
    def turn(self, text: str) -> None:
        self.rate = str(int(text))


class KnobThatChangesAnyway(WithKnobs):
    def turn(self, text: str) -> None:
        self.rate, before = text, self.rate
        if not text.isdigit():
            raise KnobError(f"{text!r} is no rate, and {before!r} was one")


class KnobThatForgetsItsUnit(WithKnobs):
    def __init__(self, below: AnyChannel) -> None:
        super().__init__(below)
        self.knobs = {"mutant.rate": Knob(lambda: f"{self.rate} bytes", self.turn)}


class CountersThatRaise(PassingChannel):
    def __init__(self, below: AnyChannel) -> None:
        super().__init__(below)
        self.open = True

    def abort(self) -> None:
        self.open = False
        super().abort()

    def counters(self) -> dict[str, float]:
        if not self.open:
            raise ChannelClosed("it was closed by this side")
        return {"mutant.sent-bytes": 1.0}


class CountersOfText(PassingChannel):
    def counters(self) -> dict[str, float]:
        return {"mutant.sent": cast(float, "5 MB")}


class WaitsForNothing(PassingChannel):
    def waits_for(self) -> str:
        return cast(str, None)


class CallSizeOfNothing(PassingChannel):
    def __init__(self, below: AnyChannel) -> None:
        super().__init__(below)
        self.call_size = 0


class OneWay(PassingChannel):
    """At the destination alone it is a contradiction."""

    @property
    def two_way(self) -> bool:
        return False
