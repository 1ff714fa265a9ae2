"""The migration task against a fake machine and fake channels: nothing is lost, and one side runs."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmmig import stream
from kvmmig.errors import (
    ChannelBroken,
    ConnectFailed,
    GuestEnded,
    MigrationCancelled,
    WrongState,
)
from kvmmig.machine.cpu import Ending
from kvmmig.machine.memory import PAGE_SIZE
from kvmmig.machine.state import StateSection
from kvmmig.machine.states import State
from kvmmig.migration.outgoing import OutgoingMigration
from kvmmig.migration.policy import (
    Continue,
    Decision,
    GiveUp,
    Limits,
    MaxRounds,
    Policy,
    RoundFigures,
    Stop,
    Stopped,
)
from kvmmig.migration.report import Phase
from kvmmig.testing.machine import FakeMachine

from .fakes import (
    POLITE,
    Conversation,
    Endless,
    Given,
    Sink,
    machine_with_pages,
    received,
    restored,
    run_to_failure,
)


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
        assert sink.closed or sink.two_way
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


async def test_a_page_that_no_tracker_ever_reports_is_sent_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine = machine_with_pages()
    monkeypatch.setattr(machine.tracker, "collect", lambda into: 0)
    sink = Sink()
    await OutgoingMigration(machine, Given(sink), policy=MaxRounds(1)).run()
    assert received(bytes(sink.data))[0] == bytes(machine.memory.pages(0, 64))


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


async def test_a_sink_that_is_always_ready_does_not_make_a_step_longer(
    mock_clock: trio.testing.MockClock,
) -> None:
    """No EAGAIN, no bandwidth limit: a call that takes a step's time is its last, and each of them does."""
    calls = 0

    def on_send(room: int) -> int:
        nonlocal calls
        calls += 1
        mock_clock.jump(0.001)
        return min(room, 1000)

    limits = Limits(step=0.001)
    migration = OutgoingMigration(
        machine_with_pages(), Given(Sink(on_send)), policy=MaxRounds(1), limits=limits
    )
    statistics = await migration.run()
    assert statistics.steps.count >= calls >= 7 * PAGE_SIZE // 1000


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
        error = await run_to_failure(
            OutgoingMigration(machine, Given(sink, stores=True), policy=MaxRounds(2))
        )
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
        migration = OutgoingMigration(machine, Given(sink, stores=True), policy=MaxRounds(2))
        with trio.fail_after(60):
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
    machine, stuck = machine_with_pages(), trio.Event()
    migration = OutgoingMigration(machine, Given(Sink(lambda room: stuck.set() or 0)))
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def ask() -> None:
            await stuck.wait()
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


async def test_a_migration_that_takes_too_long_gives_the_guest_back(
    mock_clock: trio.testing.MockClock,
) -> None:
    calls = 0

    def on_send(room: int) -> int:
        nonlocal calls
        calls += 1
        mock_clock.jump(0.5)
        return min(room, 100)

    machine, sink = machine_with_pages(), Sink(on_send)
    limits = Limits(timeout=10)
    error = await run_to_failure(OutgoingMigration(machine, Given(sink), policy=Endless(), limits=limits))
    assert "took longer than 10 s" in str(error)
    assert calls in (20, 21), "no later"
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
    with trio.fail_after(60):
        statistics = await migration.run()
    assert machine.state is State.MOVED
    assert received(bytes(sink.data))[0] == bytes(machine.memory.pages(0, 64))
    assert any("whatever is left" in event.what for event in statistics.events)


async def test_throttling_is_undone_when_the_guest_stays() -> None:
    class Impatient(Endless):
        def decide(self, figures: RoundFigures) -> Decision:
            return GiveUp("enough") if figures.round == 2 else super().decide(figures)

    machine = machine_with_pages()
    migration = OutgoingMigration(machine, Given(Sink()), policy=Impatient())
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

    def on_round(figures: RoundFigures) -> None:
        held.append(migration.statistics().bandwidth)

    held: list[float | None] = []
    migration = OutgoingMigration(
        machine_with_pages(),
        Given(Sink()),
        policy=Greedy(),
        limits=Limits(bandwidth=5e6),
        on_round=on_round,
    )
    statistics = await migration.run()
    assert [*held, statistics.bandwidth] == [3e6, 5e6]


async def test_the_bandwidth_can_be_changed_while_it_runs() -> None:
    def on_send(room: int) -> int:
        rooms.append(room)
        if len(rooms) == 2:
            migration.set_bandwidth(None)
        return room

    machine, rooms = machine_with_pages(), list[int]()
    migration = OutgoingMigration(
        machine, Given(Sink(on_send)), policy=MaxRounds(1), limits=Limits(bandwidth=50.0)
    )
    await migration.run()
    assert max(rooms[:2]) <= 5, "a byte is worth a call, and 5 are what 100 ms allow"
    assert rooms[2] > 5
    assert machine.state is State.MOVED
    with pytest.raises(ValueError, match="would never end"):
        migration.set_bandwidth(0)


async def test_a_guest_that_ends_meanwhile_is_not_moved() -> None:
    machine = machine_with_pages()
    stuck = trio.Event()
    sink = Sink(lambda room: stuck.set() or 0)
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def end() -> None:
            await stuck.wait()
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
    assert isinstance(end, stream.End)
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


async def test_a_guest_that_is_stopped_from_the_beginning_is_sent_once_and_goes_on_after_a_failure() -> None:
    machine, sink = machine_with_pages(), Sink()
    figures = await OutgoingMigration(machine, Given(sink, stores=True), policy=Stopped()).run()
    assert figures.rounds == ()
    assert figures.final_pass is not None
    assert figures.sent_pages + figures.zero_pages == figures.total_pages
    _, told = received(bytes(sink.data))
    assert [event.running for event in told if isinstance(event, stream.End)] == [True], "and goes on there"

    def fail(_: int) -> int:
        raise ChannelBroken("no disk")

    machine = machine_with_pages()
    await run_to_failure(OutgoingMigration(machine, Given(Sink(fail), stores=True), policy=Stopped()))
    assert restored(machine)
