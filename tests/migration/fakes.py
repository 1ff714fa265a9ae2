"""A source whose machine and channels are fake: sinks, and a destination that follows a script."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from kvmmig import stream
from kvmmig.errors import (
    ConnectFailed,
    KvmmigError,
)
from kvmmig.machine.memory import MEMORY_UNIT, PAGE_SIZE
from kvmmig.machine.states import State
from kvmmig.migration.outgoing import OutgoingMigration
from kvmmig.migration.phases import Phase
from kvmmig.migration.policy import Continue, Decision, Policy, RoundFigures
from kvmmig.stream.format import NEXT
from kvmmig.testing.machine import FakeMachine
from kvmmig.transport import Channel, Listener, SendChannel, Transport, TransportURI


class Endless(Policy):
    """Never stops the guest; slows it down a little more each time."""

    def decide(self, figures: RoundFigures) -> Decision:
        return Continue(throttle=min(0.1 * (figures.round + 1), 0.9))


class Sink(SendChannel):
    """Takes bytes as its owner likes: ``on_send(room)`` says how many, 0 blocks until cancelled."""

    peer = "a test's sink"

    def __init__(self, on_send: Callable[[int], int] = lambda room: room) -> None:
        self.data = bytearray()
        self.flushed = self.closed = self.aborted = False
        self._on_send = on_send

    async def send_some(self, buffers: Sequence[memoryview]) -> int:
        await trio.lowlevel.checkpoint()
        joined = b"".join(buffers)
        count = self._on_send(len(joined))
        if count == 0:
            await trio.sleep_forever()
        self.data += joined[:count]
        return count

    async def flush(self) -> None:
        await trio.lowlevel.checkpoint()
        self.flushed = True

    def abort(self) -> None:
        self.aborted = not self.closed

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()
        assert self.flushed, "flush is the fence that comes before the commit"
        self.closed = True


class Given(Transport):
    """Gives the channel that the test made."""

    def __init__(self, channel: SendChannel | None = None, *, stores: bool = False) -> None:
        super().__init__(TransportURI("given", "x"))
        self.channel = channel
        self.stores = stores

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[SendChannel]:
        if self.channel is None:
            raise ConnectFailed("nobody listens there")
        yield self.channel

    @asynccontextmanager
    async def listen(self) -> AsyncIterator[Listener]:
        raise NotImplementedError
        yield  # type: ignore[unreachable]  # makes it a context


def received(data: bytes) -> tuple[bytes, list[stream.Event]]:
    """What a destination has after this stream: its memory, and what it was told besides pages."""
    decoder = stream.Decoder(stream.Direction.FORWARDS)
    memory = memoryview(bytearray(MEMORY_UNIT))
    told: list[stream.Event] = []
    rest = memoryview(data)
    while rest:
        room = decoder.buffer()
        size = min(len(room), len(rest))
        room[:size], rest = rest[:size], rest[size:]
        match decoder.advance(size):
            case stream.Pages(runs, _):
                decoder.place([memory[f * PAGE_SIZE : (f + c) * PAGE_SIZE] for f, c in runs.tolist()])
            case stream.Zeros(runs, _):
                for first, count in runs.tolist():
                    memory[first * PAGE_SIZE : (first + count) * PAGE_SIZE] = bytes(count * PAGE_SIZE)
            case stream.PagesDone() | None:
                pass
            case event:
                told.append(event)
    return bytes(memory), told


def restored(machine: FakeMachine, state: State = State.RUNNING) -> bool:
    return machine.state is state and not machine.tracker.on


async def run_to_failure(migration: OutgoingMigration) -> KvmmigError:
    with trio.fail_after(60), pytest.raises(KvmmigError) as caught:
        await migration.run()
    return caught.value


def time_from(phase: Phase, clock: trio.testing.MockClock) -> Callable[[Phase], None]:
    """For ``on_phase``: time stands still until ``phase``, so that no limit is up before it on any host."""

    def on_phase(now: Phase) -> None:
        if now is phase:
            clock.rate = 1.0

    return on_phase


def machine_with_pages() -> FakeMachine:
    machine = FakeMachine()
    for page in range(0, 20, 3):
        machine.write(page, 5)
    return machine


class Conversation(Sink, Channel):
    """A destination that follows a script: what it says when it has seen the hello, the end, and the go."""

    def __init__(self, script: dict[str, str], on_send: Callable[[int], int] = lambda room: room) -> None:
        super().__init__(on_send)
        self._script = script
        self._encoder = stream.Encoder(stream.Direction.BACKWARDS)
        self._answers = bytearray(self._encoder.preamble())
        self._news = trio.Event()
        self._eof = False
        self.heard: list[str] = []

    async def send_some(self, buffers: Sequence[memoryview]) -> int:
        count = await super().send_some(buffers)
        told = [
            type(event).__name__
            for event in received(bytes(self.data))[1]
            if type(event) is not stream.Section
        ]
        for name in told[len(self.heard) :]:
            self.heard.append(name)
            self._answer(self._script.get(name, ""))
        return count

    def _answer(self, what: str) -> None:
        if what == "close":
            self._eof = True
        elif what.startswith("fail "):
            self._answers += self._encoder.fail(what[5:])
        elif what == "garbage":
            self._answers += b"\xff" * 64
        elif what:
            kind = stream.Kind[what]
            # Whatever the script says is said, in its place or not.
            self._encoder.state = next(state for state, kinds in NEXT.items() if kind in kinds)
            self._answers += self._encoder.signal(kind)
        self._news.set()

    async def receive_some(self, buffer: memoryview) -> int:
        while not self._answers and not self._eof:
            self._news = trio.Event()
            await self._news.wait()
        count = min(len(buffer), len(self._answers))
        buffer[:count] = self._answers[:count]
        del self._answers[:count]
        await trio.lowlevel.checkpoint()
        return count


POLITE = {"Hello": "ACCEPT", "End": "READY", "Signal": "RUNNING"}
