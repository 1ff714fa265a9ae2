"""The migration task against a fake machine and fake channels: nothing is lost, and one side runs."""

from __future__ import annotations

import random
import threading
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmmig.errors import (
    ChannelBroken,
    ConnectFailed,
    GuestEnded,
    KvmmigError,
    MigrationCancelled,
    MigrationError,
    MigrationRefused,
    OutcomeUnknown,
    WrongState,
)
from kvmmig.machine.cpu import Ending
from kvmmig.machine.machine import State
from kvmmig.machine.memory import MEMORY_UNIT, PAGE_SIZE
from kvmmig.machine.state import StateSection
from kvmmig.migration import wire
from kvmmig.migration.outgoing import OutgoingMigration
from kvmmig.migration.pages import PageMap
from kvmmig.migration.policy import Continue, Decision, GiveUp, Limits, MaxRounds, Policy, RoundFigures, Stop
from kvmmig.migration.report import Phase
from kvmmig.migration.transport import Channel, ChannelFeatures, Listener, Transport, TransportURI
from kvmmig.testing.machine import FakeMachine


class Sink(Channel):
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

    async def receive_some(self, buffer: memoryview) -> int:
        raise NotImplementedError

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

    def __init__(self, channel: Channel | None = None) -> None:
        super().__init__(TransportURI("given", "x"))
        self.channel = channel

    async def connect(self) -> Channel:
        if self.channel is None:
            raise ConnectFailed("nobody listens there")
        return self.channel

    async def listen(self) -> Listener:
        raise NotImplementedError


def received(data: bytes) -> tuple[bytes, list[wire.Event]]:
    """What a destination has after this stream: its memory, and what it was told besides pages."""
    decoder = wire.Decoder(wire.Direction.FORWARDS)
    memory = memoryview(bytearray(MEMORY_UNIT))
    told: list[wire.Event] = []
    rest = memoryview(data)
    while rest:
        room = decoder.buffer()
        size = min(len(room), len(rest))
        room[:size], rest = rest[:size], rest[size:]
        match decoder.advance(size):
            case wire.Pages(runs, _):
                decoder.place([memory[f * PAGE_SIZE : (f + c) * PAGE_SIZE] for f, c in runs.tolist()])
            case wire.Zeros(runs, _):
                for first, count in runs.tolist():
                    memory[first * PAGE_SIZE : (first + count) * PAGE_SIZE] = bytes(count * PAGE_SIZE)
            case wire.PagesDone() | None:
                pass
            case event:
                told.append(event)
    return bytes(memory), told


@settings(max_examples=60)
@given(st.integers(0, 2**32), st.integers(1, 6), st.booleans(), st.booleans())
def test_the_destinations_memory_is_the_sources_whatever_is_written_when(
    seed: int, rounds: int, forced: bool, saved: bool
) -> None:
    """Random prefixes, blocked steps, frames cut anywhere, pages written and zeroed all the while.

    Over a link as they are, and into a saved guest from copies with digests, which a thread prepares.
    """

    async def main() -> None:
        random_ = random.Random(seed)
        machine = FakeMachine()

        def on_send(room: int) -> int:
            if machine.state is State.RUNNING:
                for _ in range(random_.randrange(4)):
                    machine.write(random_.randrange(64), random_.choice([0, 0, 1, 7, 255]))
            return random_.choice([0, 1, random_.randint(1, room), random_.randint(1, room), room, room])

        for page in range(0, 64, random_.randint(1, 9)):
            machine.write(page, page + 1)
        sink = Sink(on_send) if saved else Conversation(POLITE, on_send)
        limits = Limits(step=0.0005, timeout=0.002 if forced else None, on_timeout="force")
        migration = OutgoingMigration(machine, Given(sink), policy=MaxRounds(rounds), limits=limits)
        statistics = await migration.run()
        memory, told = received(bytes(sink.data))
        assert memory == bytes(machine.memory.pages(0, 64))
        assert [type(event).__name__ for event in told] == ["Hello", "Section", "End", "Signal"]
        assert machine.state is State.MOVED
        assert not machine.tracker.on
        assert sink.closed or sink.features.two_way
        assert statistics.remaining_pages == 0
        assert len(statistics.rounds) == rounds or forced
        machine.memory.close()

    trio.run(main)


@pytest.mark.parametrize("two_way", [True, False])
async def test_the_event_loop_looks_at_no_page(two_way: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes tens of milliseconds a batch in a guest whose pages begin with zeros."""
    machine = machine_with_pages()
    loop, threads = threading.get_ident(), set()
    are_zero = machine.memory.are_zero

    def noted(pages: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        threads.add(threading.get_ident())
        return are_zero(pages)

    monkeypatch.setattr(machine.memory, "are_zero", noted)
    await OutgoingMigration(machine, Given(Conversation(POLITE) if two_way else Sink())).run()
    assert threads
    assert loop not in threads


@pytest.mark.parametrize("stride", [1, 2, 40])
async def test_scattered_and_contiguous_pages_arrive_alike(stride: int) -> None:
    machine = FakeMachine()
    for page in range(0, 64, stride):
        machine.write(page, page + 1)
    sink = Sink()
    statistics = await OutgoingMigration(machine, Given(sink), policy=MaxRounds(1)).run()
    assert received(bytes(sink.data))[0] == bytes(machine.memory.pages(0, 64))
    sent = len(range(0, 64, stride))
    assert (statistics.sent_pages, statistics.zero_pages) == (sent, 64 - sent)


async def test_a_sink_that_is_always_ready_does_not_make_a_step_longer() -> None:
    """The story of the design: no EAGAIN, no bandwidth limit, and the loop gets its turns all the same."""
    machine = FakeMachine(64 * MEMORY_UNIT)
    for page in range(0, 64 * 64, 2):
        machine.write(page, 1)
    with_bound = await OutgoingMigration(
        machine, Given(Sink(lambda room: min(room, 1000))), policy=MaxRounds(1), limits=Limits(step=0.001)
    ).run()
    assert with_bound.steps.count > 5
    machine.memory.close()


def restored(machine: FakeMachine, state: State = State.RUNNING) -> bool:
    return machine.state is state and not machine.tracker.on


async def run_to_failure(migration: OutgoingMigration) -> KvmmigError:
    with trio.fail_after(10), pytest.raises(KvmmigError) as caught:
        await migration.run()
    return caught.value


async def test_a_connection_that_fails_leaves_the_guest_as_it_was() -> None:
    machine = FakeMachine()
    migration = OutgoingMigration(machine, Given(None))
    assert isinstance(await run_to_failure(migration), ConnectFailed)
    assert restored(machine)
    assert migration.statistics().phase is Phase.FAILED
    assert migration.statistics().error == "nobody listens there"


async def total_sends() -> int:
    """How many calls an undisturbed migration of `machine_with_pages` makes with 3,000 bytes a call."""
    calls = 0

    def on_send(room: int) -> int:
        nonlocal calls
        calls += 1
        return min(room, 3000)

    await OutgoingMigration(machine_with_pages(), Given(Sink(on_send)), policy=MaxRounds(2)).run()
    return calls


def machine_with_pages() -> FakeMachine:
    machine = FakeMachine()
    for page in range(0, 20, 3):
        machine.write(page, 5)
    return machine


async def test_whichever_call_breaks_the_source_runs_on() -> None:
    for call in range(await total_sends()):
        machine = machine_with_pages()
        left = call

        def on_send(room: int) -> int:
            nonlocal left
            left -= 1
            if left < 0:
                raise ChannelBroken("the disk is full")
            return min(room, 3000)

        sink = Sink(on_send)
        error = await run_to_failure(OutgoingMigration(machine, Given(sink), policy=MaxRounds(2)))
        assert str(error) == "the disk is full"
        assert restored(machine)
        assert sink.aborted


@pytest.mark.parametrize("how", ["command", "scope"])
async def test_whichever_call_is_stuck_a_cancel_gives_the_guest_back(how: str) -> None:
    for call in range(await total_sends()):
        machine = machine_with_pages()
        left = call
        stuck = trio.Event()

        def on_send(room: int) -> int:
            nonlocal left
            left -= 1
            if left < 0:
                stuck.set()  # noqa: B023  # called only while this iteration lasts
                return 0
            return min(room, 3000)

        sink = Sink(on_send)
        migration = OutgoingMigration(machine, Given(sink), policy=MaxRounds(2))
        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                if how == "command":
                    nursery.start_soon(run_to_failure, migration)
                    await stuck.wait()
                    migration.cancel()
                else:
                    nursery.start_soon(migration.run)
                    await stuck.wait()
                    nursery.cancel_scope.cancel()
        assert restored(machine)
        assert sink.aborted
        assert migration.statistics().phase is Phase.CANCELLED


async def test_a_cancel_by_command_says_who_asked() -> None:
    machine = machine_with_pages()
    migration = OutgoingMigration(machine, Given(Sink(lambda room: 0)))
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def ask() -> None:
            await trio.sleep(0.01)
            migration.cancel("you pressed Ctrl-C")

        error = await run_to_failure(migration)
    assert isinstance(error, MigrationCancelled)
    assert "you pressed Ctrl-C" in str(error)


async def test_a_sink_that_accepts_nothing_is_given_up() -> None:
    machine = machine_with_pages()
    error = await run_to_failure(
        OutgoingMigration(machine, Given(Sink(lambda room: 0)), limits=Limits(step=0.001, stall_timeout=0.05))
    )
    assert "accepted nothing for 0.05 s" in str(error)
    assert restored(machine)


async def test_a_policy_may_give_up() -> None:
    class Never(Policy):
        def decide(self, figures: RoundFigures) -> Decision:
            return GiveUp("this guest writes too fast")

    machine = machine_with_pages()
    sink = Sink()
    error = await run_to_failure(OutgoingMigration(machine, Given(sink), policy=Never()))
    assert "given up: this guest writes too fast" in str(error)
    assert restored(machine)
    assert sink.aborted


class Endless(Policy):
    """Never stops the guest; slows it down a little more each time."""

    def decide(self, figures: RoundFigures) -> Decision:
        return Continue(throttle=min(0.1 * (figures.round + 1), 0.9))


async def test_a_migration_that_takes_too_long_gives_the_guest_back() -> None:
    machine = machine_with_pages()
    sink = Sink(lambda room: min(room, 100))
    limits = Limits(timeout=0.1)
    error = await run_to_failure(OutgoingMigration(machine, Given(sink), policy=Endless(), limits=limits))
    assert "took longer than 0.1 s" in str(error)
    assert restored(machine)
    assert sink.aborted


async def test_a_migration_that_takes_too_long_can_be_forced_to_an_end() -> None:
    machine = machine_with_pages()

    def on_send(room: int) -> int:
        if machine.state is State.RUNNING:
            machine.write(40, len(sink.data) % 256)
        return min(room, 700)  # so it is cut in the middle of a page

    sink = Sink(on_send)
    limits = Limits(timeout=0.1, on_timeout="force", step=0.001)
    migration = OutgoingMigration(machine, Given(sink), policy=Endless(), limits=limits)
    with trio.fail_after(10):
        statistics = await migration.run()
    assert machine.state is State.MOVED
    assert received(bytes(sink.data))[0] == bytes(machine.memory.pages(0, 64))
    assert any("whatever is left" in event.what for event in statistics.events)


async def test_throttling_is_undone_when_the_guest_stays() -> None:
    machine = machine_with_pages()
    migration = OutgoingMigration(machine, Given(Sink()), policy=Endless(), limits=Limits(timeout=0.05))
    await run_to_failure(migration)
    assert machine.throttled[:2] == [0.1, 0.2]
    assert machine.throttled[-1] == 0.0
    assert migration.statistics().throttle == 0.0


async def test_a_policys_bandwidth_holds_but_never_above_the_users() -> None:
    class Greedy(Policy):
        def start(self) -> Continue:
            return Continue(bandwidth=3e6)

        def decide(self, figures: RoundFigures) -> Decision:
            return Stop(bandwidth=9e6)

    machine = machine_with_pages()
    limits = Limits(bandwidth=5e6)
    statistics = await OutgoingMigration(machine, Given(Sink()), policy=Greedy(), limits=limits).run()
    assert statistics.bandwidth == 5e6
    assert statistics.rounds[0].rate < 4e6


async def test_the_bandwidth_can_be_changed_while_it_runs() -> None:
    machine = machine_with_pages()
    migration = OutgoingMigration(machine, Given(Sink()), policy=MaxRounds(1), limits=Limits(bandwidth=10.0))
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(migration.run)
            await trio.sleep(0.05)
            assert migration.statistics().sent_bytes < 100
            migration.set_bandwidth(None)
    assert machine.state is State.MOVED
    with pytest.raises(ValueError, match="would never end"):
        migration.set_bandwidth(0)


async def test_a_guest_that_ends_meanwhile_is_not_moved() -> None:
    machine = machine_with_pages()
    sink = Sink(lambda room: 0)
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def end() -> None:
            await trio.sleep(0.01)
            machine.end(Ending("exit", 3))

        error = await run_to_failure(OutgoingMigration(machine, Given(sink)))
    assert isinstance(error, GuestEnded)
    assert "exited with status 3" in str(error)
    assert sink.aborted


async def test_a_paused_guest_moves_paused_and_stays_so_after_a_failure() -> None:
    machine = machine_with_pages()
    await machine.pause()
    await run_to_failure(OutgoingMigration(machine, Given(None)))
    assert restored(machine, State.PAUSED)
    sink = Sink()
    await OutgoingMigration(machine, Given(sink)).run()
    end = received(bytes(sink.data))[1][-2]
    assert isinstance(end, wire.End)
    assert not end.running


async def test_a_guest_that_was_never_started_is_refused() -> None:
    machine = FakeMachine()
    machine.state = State.CREATED
    with pytest.raises(WrongState, match="has not been started, so it can't be migrated"):
        await OutgoingMigration(machine, Given(Sink())).run()


async def test_a_page_written_while_state_is_captured_still_moves() -> None:
    class Scribbler(FakeMachine):
        async def capture(self) -> Sequence[StateSection]:
            self.memory.pages(9)[:] = b"\x99" * PAGE_SIZE
            self.tracker.record(9)
            return [StateSection("cpu0/regs", 1, b"")]

    sink = Sink()
    machine = Scribbler()
    await OutgoingMigration(machine, Given(sink), policy=MaxRounds(1)).run()
    assert received(bytes(sink.data))[0][9 * PAGE_SIZE] == 0x99


# -- two-way: the other side has a say ------------------------------------------------------------------


class Conversation(Sink):
    """A destination that follows a script: what it says when it has seen the hello, the end, and the go."""

    features = ChannelFeatures(two_way=True)

    def __init__(self, script: dict[str, str], on_send: Callable[[int], int] = lambda room: room) -> None:
        super().__init__(on_send)
        self._script = script
        self._encoder = wire.Encoder(wire.Direction.BACKWARDS)
        self._answers = bytearray(self._encoder.preamble())
        self._news = trio.Event()
        self._eof = False
        self.heard: list[str] = []

    async def send_some(self, buffers: Sequence[memoryview]) -> int:
        count = await super().send_some(buffers)
        told = [
            type(event).__name__ for event in received(bytes(self.data))[1] if type(event) is not wire.Section
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
            kind = wire.Kind[what]
            # Whatever the script says is said, in its place or not.
            self._encoder.phase = next(phase for phase, kinds in wire._NEXT.items() if kind in kinds)
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


async def test_the_hand_over_is_ready_go_running() -> None:
    machine = machine_with_pages()
    peer = Conversation(POLITE)
    statistics = await OutgoingMigration(machine, Given(peer)).run()
    assert peer.heard == ["Hello", "End", "Signal"]
    assert machine.state is State.MOVED
    assert statistics.phase is Phase.DONE
    assert statistics.downtime is not None


@pytest.mark.parametrize("at", ["Hello", "End"])
@pytest.mark.parametrize(
    ("answer", "kind", "sentence"),
    [
        ("fail no room here", MigrationRefused, "can't take the guest: no room here"),
        ("close", ChannelBroken, "closed the connection"),
        ("garbage", KvmmigError, ""),
        ("", MigrationError, "did not say"),
        ("RUNNING", KvmmigError, "out of place"),
    ],
)
async def test_before_go_whatever_the_other_side_says_the_source_keeps_the_guest(
    at: str, answer: str, kind: type[KvmmigError], sentence: str
) -> None:
    machine = machine_with_pages()
    peer = Conversation({**POLITE, at: answer})
    error = await run_to_failure(
        OutgoingMigration(machine, Given(peer), limits=Limits(setup_timeout=0.1, handover_timeout=0.1))
    )
    assert isinstance(error, kind)
    assert sentence in str(error)
    assert "Signal" not in peer.heard, "go was never said"
    assert restored(machine)
    assert peer.aborted


@pytest.mark.parametrize("answer", ["close", "", "fail it would not start", "garbage"])
async def test_after_go_the_source_never_runs_again_by_itself(answer: str) -> None:
    machine = machine_with_pages()
    peer = Conversation({**POLITE, "Signal": answer})
    migration = OutgoingMigration(machine, Given(peer), limits=Limits(handover_timeout=0.1))
    error = await run_to_failure(migration)
    assert isinstance(error, OutcomeUnknown)
    assert "Look there first" in str(error)
    assert machine.state is State.MOVED
    assert migration.statistics().phase is Phase.UNKNOWN
    with pytest.raises(MigrationError, match="too late"):
        migration.cancel()


class Reader(Sink):
    """One way, to somebody who may start the guest; ``at_end`` is what comes of closing it."""

    def __init__(self, at_end: Callable[[], Awaitable[None]]) -> None:
        super().__init__()
        self.closing = trio.Event()
        self._at_end = at_end

    async def aclose(self) -> None:
        self.closing.set()
        await self._at_end()
        await super().aclose()


@pytest.mark.parametrize("stores", [True, False])
async def test_who_may_have_started_the_guest_does_not_lose_it_to_a_failure(stores: bool) -> None:
    async def fail() -> None:
        raise ChannelBroken("the command ended with status 3")

    machine, sink = machine_with_pages(), Reader(fail)
    sink.features = ChannelFeatures(stores=stores)
    error = await run_to_failure(OutgoingMigration(machine, Given(sink)))
    assert "ended with status 3" in str(error)
    if stores:
        assert isinstance(error, ChannelBroken)
        assert restored(machine)
    else:
        assert isinstance(error, OutcomeUnknown)
        assert machine.state is State.MOVED


async def test_a_reader_that_never_ends_keeps_the_guest_too() -> None:
    machine, sink = machine_with_pages(), Reader(trio.sleep_forever)
    limits = Limits(handover_timeout=0.05)
    error = await run_to_failure(OutgoingMigration(machine, Given(sink), limits=limits))
    assert isinstance(error, OutcomeUnknown)
    assert machine.state is State.MOVED


async def test_what_keeps_a_reader_from_taking_all_of_it_is_found_out_before_go() -> None:
    class Stuck(Sink):
        async def flush(self) -> None:
            await trio.sleep_forever()

    machine, sink = machine_with_pages(), Stuck()
    limits = Limits(handover_timeout=0.05)
    error = await run_to_failure(OutgoingMigration(machine, Given(sink), limits=limits))
    assert "did not take the last bytes" in str(error)
    assert restored(machine)
    assert not any(isinstance(event, wire.Signal) for event in received(bytes(sink.data))[1])


@pytest.mark.parametrize("hangs", [False, True])
async def test_a_cancel_from_outside_after_go_waits_a_moment_for_the_last_byte(hangs: bool) -> None:
    """Or a reader would have "go" and no end of the stream, and the guest would be nowhere."""
    machine = machine_with_pages()
    sink = Reader(trio.sleep_forever if hangs else partial(trio.sleep, 0.001))
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(OutgoingMigration(machine, Given(sink)).run)
            await sink.closing.wait()
            nursery.cancel_scope.cancel()
    assert machine.state is State.MOVED
    assert sink.closed != hangs
    assert sink.aborted == hangs


async def test_the_other_sides_last_words_explain_more_than_a_broken_pipe() -> None:
    class Hasty(Conversation):
        async def send_some(self, buffers: Sequence[memoryview]) -> int:
            if self.heard:
                self._answer("fail my disk is full")
                raise ChannelBroken("reset")
            return await super().send_some(buffers)

    machine = machine_with_pages()
    error = await run_to_failure(OutgoingMigration(machine, Given(Hasty(POLITE))))
    assert isinstance(error, MigrationRefused)
    assert "my disk is full" in str(error)


# -- what can be done to it while it runs -------------------------------------------------------------------


async def test_it_waits_before_the_switchover_until_it_is_told_to_proceed() -> None:
    machine, sink = machine_with_pages(), Sink()
    phases: list[Phase] = []
    migration = OutgoingMigration(
        machine, Given(sink), policy=MaxRounds(1), pause_before_switchover=True, on_phase=phases.append
    )
    with pytest.raises(MigrationError, match="only in the pre-switchover phase"):
        migration.proceed()
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(migration.run)
            while phases[-1:] != [Phase.PRE_SWITCHOVER]:  # noqa: ASYNC110 - it is told by a plain call
                await trio.sleep(0.001)
            await trio.testing.wait_all_tasks_blocked()
            assert machine.state is State.PAUSED
            assert not sink.closed
            migration.proceed()
    assert received(bytes(sink.data))[0] == bytes(machine.memory.pages(0, 64))
    assert phases[-5:] == [Phase.PRE_SWITCHOVER, Phase.STOP, Phase.FINAL, Phase.COMMIT, Phase.DONE]


async def test_a_cancel_before_the_switchover_gives_the_guest_back() -> None:
    machine = machine_with_pages()
    migration = OutgoingMigration(
        machine, Given(Sink()), policy=MaxRounds(1), pause_before_switchover=True, limits=Limits(timeout=0.05)
    )
    error = await run_to_failure(migration)
    assert "took longer than 0.05 s" in str(error)
    assert restored(machine)


async def test_another_policy_decides_from_the_next_round_on() -> None:
    machine = machine_with_pages()
    rounds: list[RoundFigures] = []

    def on_round(figures: RoundFigures) -> None:
        rounds.append(figures)
        if len(rounds) == 3:
            assert migration.statistics().bandwidth == 1e9
            migration.set_policy(MaxRounds(5))

    class Limiting(Endless):
        def start(self) -> Continue:
            return Continue(bandwidth=1e9)

    migration = OutgoingMigration(machine, Given(Sink()), policy=Limiting(), on_round=on_round)
    with trio.fail_after(10):
        statistics = await migration.run()
    assert len(statistics.rounds) == len(rounds) == 5
    assert statistics.bandwidth is None, "what the former policy wanted is undone"


async def test_the_page_map_says_what_is_owed_and_what_was_sent() -> None:
    machine = machine_with_pages()

    def on_round(figures: RoundFigures) -> None:
        if figures.round == 0:
            maps.append(migration.page_map(1000))

    maps: list[PageMap] = []
    sink = Sink()
    migration = OutgoingMigration(machine, Given(sink), policy=MaxRounds(2), on_round=on_round)
    before = migration.page_map(1)
    await migration.run()
    assert (before.pages, before.pending, before.sent) == ([machine.memory.n_pages], [0], [0])
    assert sum(maps[0].sent) == machine.memory.n_pages
    assert sum(migration.page_map(7).pages) == machine.memory.n_pages
    with pytest.raises(ValueError, match="ask for at least 1"):
        migration.page_map(0)


async def test_a_channel_that_does_not_move_says_what_it_waits_for() -> None:
    sink = Sink(lambda room: 0)
    sink.waits_for = lambda: "its disk sleeps"  # type: ignore[method-assign]  # a stub
    migration = OutgoingMigration(
        machine_with_pages(), Given(sink), policy=Endless(), limits=Limits(stall_timeout=0.05)
    )
    error = await run_to_failure(migration)
    assert str(error) == "a test's sink accepted nothing for 0.05 s: its disk sleeps"


@pytest.mark.parametrize("two_way", [False, True])
async def test_a_guest_that_somebody_lets_run_in_the_final_pass_stays_here(two_way: bool) -> None:
    machine = machine_with_pages()

    def on_phase(phase: Phase) -> None:
        if phase is Phase.COMMIT:
            machine.state = State.RUNNING

    sink = Conversation(POLITE) if two_way else Sink()
    migration = OutgoingMigration(machine, Given(sink), policy=MaxRounds(1), on_phase=on_phase)
    error = await run_to_failure(migration)
    assert "somebody let it run" in str(error)
    assert machine.state is State.RUNNING
    assert sink.aborted
    assert not any(isinstance(event, wire.Signal) for event in received(bytes(sink.data))[1]), "no go"
