"""What can be asked of a migration, and done to it, while it runs."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from kvmmig.errors import (
    MigrationError,
)
from kvmmig.machine.states import State
from kvmmig.migration.outgoing import OutgoingMigration
from kvmmig.migration.pagemap import PageMap
from kvmmig.migration.policy import Continue, Limits, MaxRounds, RoundFigures
from kvmmig.migration.report import Phase

from .fakes import Endless, Given, Sink, machine_with_pages, received, restored, run_to_failure


async def test_it_waits_before_the_switchover_until_it_is_told_to_proceed() -> None:
    machine, sink = machine_with_pages(), Sink()
    phases: list[Phase] = []
    migration = OutgoingMigration(
        machine, Given(sink), policy=MaxRounds(1), pause_before_switchover=True, on_phase=phases.append
    )
    with pytest.raises(MigrationError, match="only in the pre-switchover phase"):
        migration.proceed()
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(migration.run)
            while phases[-1:] != [Phase.PRE_SWITCHOVER]:  # noqa: ASYNC110 - it is told by a plain call
                await trio.sleep(0.001)
            await trio.testing.wait_all_tasks_blocked()
            assert machine.state is State.PAUSED
            assert not sink.closed
            migration.proceed()
    assert received(bytes(sink.data))[0] == bytes(machine.memory.pages(0, 64))
    assert phases[-6:] == [
        Phase.PRE_SWITCHOVER,
        Phase.STOP,
        Phase.FINAL,
        Phase.COMMIT,
        Phase.HANDED_OVER,
        Phase.DONE,
    ]


async def test_a_limit_of_time_holds_before_the_switchover_too(mock_clock: trio.testing.MockClock) -> None:
    machine = machine_with_pages()

    def on_phase(phase: Phase) -> None:
        if phase is Phase.PRE_SWITCHOVER:
            mock_clock.jump(10.0)

    migration = OutgoingMigration(
        machine,
        Given(Sink()),
        policy=MaxRounds(1),
        pause_before_switchover=True,
        limits=Limits(timeout=10),
        on_phase=on_phase,
    )
    error = await run_to_failure(migration)
    assert "took longer than 10 s" in str(error)
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
    with trio.fail_after(60):
        statistics = await migration.run()
    assert len(statistics.rounds) == len(rounds) == 5
    assert statistics.bandwidth is None, "what the former policy wanted is undone"


async def test_the_page_map_says_what_is_pending_and_what_was_sent() -> None:
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
