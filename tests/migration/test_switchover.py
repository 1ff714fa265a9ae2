"""The hand-over under a link that dies: at every frame, in both directions, never two sides run.

Both machines are real. The guest only spins, so that every migration of it is the same to the byte.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager

import pytest
import trio

from kvmmig import stream
from kvmmig.errors import ChannelBroken, ChannelClosed, KvmmigError, OutcomeUnknown
from kvmmig.machine import Entry, Machine, MachineConfig, Program, State
from kvmmig.migration.incoming import IncomingMigration
from kvmmig.migration.outgoing import OutgoingMigration
from kvmmig.migration.policy import Limits, MaxRounds
from kvmmig.testing.memory import MemoryChannel, memory_channel_pair
from kvmmig.transport import Channel, Listener, Transport, TransportURI

pytestmark = pytest.mark.kvm

SPINNER = Program("spinner", Entry.LONG64, b"\xeb\xfe")
CONFIG = MachineConfig(memory=2 << 20, on_halt="stay")  # its guest does nothing on purpose
LIMITS = Limits(handover_timeout=5, setup_timeout=5, stall_timeout=5)


class Link:
    """A wire with two ends that dies after so many bytes in one direction.

    ``swallow``: what comes after them is accepted all the same, and lost, as a kernel does whose peer has
    just vanished.
    """

    def __init__(self, *, cut: str = "", after: int = 0, swallow: bool = False, two_way: bool = True) -> None:
        self.dead = False
        self.two_way = two_way
        there, back = memory_channel_pair(capacity=1 << 26)
        self.source = LinkEnd(self, there, after if cut == "forwards" else None, swallow)
        self.destination = LinkEnd(self, back, after if cut == "backwards" else None, swallow)

    @contextmanager
    def told_dead(self) -> Iterator[None]:
        """That a test has ended the channel below is a broken link to those above."""
        try:
            yield
        except ChannelClosed:
            if not self.dead:
                raise
            raise ChannelBroken("the link died") from None

    def die(self) -> None:
        self.dead = True
        self.source.inner.abort()
        self.destination.inner.abort()


class LinkEnd(Channel):
    peer = "the other end"
    two_way = True  # or as its link is

    def __init__(self, link: Link, inner: MemoryChannel, left: int | None, swallow: bool) -> None:
        self.two_way = link.two_way
        self.inner = inner
        self.sent = bytearray()
        self.offered = bytearray()
        self._link = link
        self._left = left
        self._swallow = swallow

    async def send_some(self, buffers: Sequence[memoryview]) -> int:
        data = memoryview(b"".join(buffers))
        self.offered = self.sent + data
        if self._left is not None:
            if self._left == 0:
                await trio.lowlevel.checkpoint()
                self._link.die()
                if not self._swallow:
                    raise ChannelBroken("the link died")
                self.sent += data
                return len(data)
            data = data[: self._left]
            self._left -= len(data)
        with self._link.told_dead():
            assert await self.inner.send_some([data]) == len(data)
        self.sent += data
        return len(data)

    async def receive_some(self, buffer: memoryview) -> int:
        with self._link.told_dead():
            return await self.inner.receive_some(buffer)

    async def flush(self) -> None:
        await trio.lowlevel.checkpoint()

    def abort(self) -> None:
        self.inner.abort()

    async def aclose(self) -> None:
        if self._left == 0 and not self.two_way:
            self._link.die()  # between "go" and the end of the stream
            raise ChannelBroken("the link died")
        await self.inner.aclose()


class Given(Transport):
    """One end, however it is got."""

    def __init__(self, channel: Channel) -> None:
        super().__init__(TransportURI("given", "x"))
        self.arrives_at_once = True
        self._channel = channel

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Channel]:
        yield self._channel

    @asynccontextmanager
    async def listen(self) -> AsyncIterator[Listener]:
        yield GivenListener(self._channel)


class GivenListener(Listener):
    def __init__(self, channel: Channel) -> None:
        self.uri = TransportURI("given", "x")
        self._channel = channel

    @asynccontextmanager
    async def accept(self) -> AsyncIterator[Channel]:
        yield self._channel


class Outcome:
    """Who runs, a moment after it is over, and what the source was told."""

    source: State
    destination_ran = False
    error: KvmmigError | None = None


async def hand_over(link: Link, on_here: Callable[[Machine], None] | None = None) -> Outcome:
    outcome = Outcome()
    async with Machine.open(CONFIG) as source:
        await source.load(SPINNER)
        await source.start()

        async def receive() -> None:
            try:
                incoming = IncomingMigration(Given(link.destination), limits=LIMITS, on_here=on_here)
                async with incoming.machine() as machine:
                    outcome.destination_ran = machine.state is State.RUNNING
            except KvmmigError:
                return

        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(receive)
                migration = OutgoingMigration(source, Given(link.source), policy=MaxRounds(1), limits=LIMITS)
                try:
                    await migration.run()
                except KvmmigError as error:
                    outcome.error = error
        outcome.source = source.state
    return outcome


async def test_the_machine_is_here_before_the_source_is_told_so() -> None:
    """Who hears from the source that it is done, and looks here, finds it."""
    link = Link()
    running = stream.Signal(stream.Kind.RUNNING)
    told: list[bool] = []

    def note(machine: Machine) -> None:
        assert machine.state is State.RUNNING
        told.append(running in frames(bytes(link.destination.sent), stream.Direction.BACKWARDS)[1])

    await hand_over(link, note)
    assert told == [False]
    assert running in frames(bytes(link.destination.sent), stream.Direction.BACKWARDS)[1]


def frames(data: bytes, direction: stream.Direction) -> tuple[list[int], list[stream.Event]]:
    """Where the preamble and each whole frame end, and what they said."""
    decoder = stream.Decoder(direction)
    ends: list[int] = [16]
    events: list[stream.Event] = []
    rest = memoryview(data)
    while rest:
        room = decoder.buffer()[: len(rest)]
        room[:], rest = rest[: len(room)], rest[len(room) :]
        event = decoder.advance(len(room))
        if isinstance(event, stream.Pages):
            decoder.place([memoryview(bytearray(event.n_pages * 4096))])
        elif event is not None:
            ends.append(decoder.position)
            events.append(event)
    return ends, events


@pytest.mark.parametrize(
    ("direction", "swallow", "two_way"),
    [
        pytest.param(stream.Direction.FORWARDS, False, True, id="forwards"),
        pytest.param(stream.Direction.FORWARDS, True, True, id="forwards-swallowed"),
        pytest.param(stream.Direction.BACKWARDS, False, True, id="backwards"),
        pytest.param(stream.Direction.BACKWARDS, True, True, id="backwards-swallowed"),
        pytest.param(stream.Direction.FORWARDS, False, False, id="one-way"),
    ],
)
async def test_wherever_the_link_dies_at_most_one_side_runs(
    direction: stream.Direction, swallow: bool, two_way: bool
) -> None:
    whole = Link(two_way=two_way)
    undisturbed = await hand_over(whole)
    assert undisturbed.source is State.MOVED
    assert undisturbed.destination_ran
    assert undisturbed.error is None
    forwards = direction is stream.Direction.FORWARDS
    data = bytes((whole.source if forwards else whole.destination).sent)
    ends, _ = frames(data, direction)
    cuts = sorted({0, *ends[:-1], ends[-1] - 1, *(end + 1 for end in ends[-4:-1])})
    if not two_way:
        cuts.append(ends[-1])  # behind "go", before the end of the stream
    for cut in cuts:
        link = Link(cut=direction.name.lower(), after=cut, swallow=swallow, two_way=two_way)
        outcome = await hand_over(link)
        where = f"cut {direction.name.lower()} after {cut} of {len(data)} bytes: {outcome.error}"
        said = frames(bytes(link.source.offered), stream.Direction.FORWARDS)[1]
        go_was_offered = stream.Signal(stream.Kind.GO) in said
        runs_here = outcome.source is State.RUNNING
        assert not (runs_here and outcome.destination_ran), f"two sides run, {where}"
        assert runs_here != go_was_offered, f"the source runs whenever go was not offered, {where}"
        assert link.dead == (outcome.error is not None), (
            where
        )  # a stream may be a page shorter than the first
        assert isinstance(outcome.error, OutcomeUnknown) == (go_was_offered and link.dead), where
