"""The hand-over: whoever may have the guest does not lose it, and nobody else gets it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import pytest
import trio
from trio.testing import MockClock

from kvmmig import stream
from kvmmig.errors import (
    ChannelBroken,
    KvmmigError,
    MigrationError,
    MigrationRefused,
    OutcomeUnknown,
)
from kvmmig.machine.states import State
from kvmmig.migration.outgoing import OutgoingMigration
from kvmmig.migration.policy import Limits, MaxRounds
from kvmmig.migration.report import Phase

from .fakes import (
    POLITE,
    Conversation,
    Given,
    Sink,
    machine_with_pages,
    received,
    restored,
    run_to_failure,
    time_from,
)


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
    at: str, answer: str, kind: type[KvmmigError], sentence: str, mock_clock: MockClock
) -> None:
    machine = machine_with_pages()
    peer = Conversation({**POLITE, at: answer})
    # Silence alone is waited for.
    on_phase = time_from(Phase.SETUP if at == "Hello" else Phase.COMMIT, mock_clock) if not answer else None
    limits = Limits(setup_timeout=0.05, handover_timeout=0.05)
    error = await run_to_failure(OutgoingMigration(machine, Given(peer), limits=limits, on_phase=on_phase))
    assert isinstance(error, kind)
    assert sentence in str(error)
    assert "Signal" not in peer.heard, "go was never said"
    assert restored(machine)
    assert peer.aborted


@pytest.mark.parametrize("answer", ["close", "", "fail it would not start", "garbage"])
async def test_after_go_the_source_never_runs_again_by_itself(answer: str, mock_clock: MockClock) -> None:
    machine = machine_with_pages()
    peer = Conversation({**POLITE, "Signal": answer})
    on_phase = time_from(Phase.HANDED_OVER, mock_clock)
    limits = Limits(handover_timeout=0.05)
    migration = OutgoingMigration(machine, Given(peer), limits=limits, on_phase=on_phase)
    error = await run_to_failure(migration)
    assert isinstance(error, OutcomeUnknown)
    assert "Look there first" in str(error)
    assert machine.state is State.MOVED
    assert migration.statistics().phase is Phase.UNKNOWN
    with pytest.raises(MigrationError, match="too late"):
        migration.cancel()


def break_channel(room: int) -> int:
    raise ChannelBroken("it was cut")


def raise_value_error(room: int) -> int:
    raise ValueError("a slip")


def leave_the_process(room: int) -> int:
    raise SystemExit(3)


@pytest.mark.parametrize("two_way", [True, False])
@pytest.mark.parametrize(
    "at_go",
    [
        break_channel,
        raise_value_error,
        leave_the_process,
        lambda room: room + 1,
        lambda room: -1,
        lambda room: 0,
    ],
)
async def test_once_go_is_offered_whatever_the_channel_says_proves_nothing(
    at_go: Callable[[int], int], two_way: bool, mock_clock: MockClock
) -> None:
    """What lies about a call may have sent its bytes: the other side may run the guest."""

    def on_send(room: int) -> int:
        return at_go(room) if migration.phase is Phase.HANDED_OVER else room

    machine = machine_with_pages()
    sink = Conversation({**POLITE, "Signal": ""}, on_send) if two_way else Sink(on_send)
    on_phase = time_from(Phase.HANDED_OVER, mock_clock)
    limits = Limits(handover_timeout=0.05, stall_timeout=0.05)
    migration = OutgoingMigration(machine, Given(sink), limits=limits, on_phase=on_phase)
    error = await run_to_failure(migration)
    assert isinstance(error, OutcomeUnknown)
    assert "Look there first" in str(error)
    assert machine.state is State.MOVED
    assert migration.phase is Phase.UNKNOWN


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
    error = await run_to_failure(OutgoingMigration(machine, Given(sink, stores=stores)))
    assert "ended with status 3" in str(error)
    if stores:
        assert isinstance(error, ChannelBroken)
        assert restored(machine)
    else:
        assert isinstance(error, OutcomeUnknown)
        assert machine.state is State.MOVED


async def test_a_reader_that_never_ends_keeps_the_guest_too(mock_clock: MockClock) -> None:
    machine, sink = machine_with_pages(), Reader(trio.sleep_forever)
    on_phase = time_from(Phase.HANDED_OVER, mock_clock)
    limits = Limits(handover_timeout=0.05)
    error = await run_to_failure(OutgoingMigration(machine, Given(sink), limits=limits, on_phase=on_phase))
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
    assert not any(isinstance(event, stream.Signal) for event in received(bytes(sink.data))[1])


@pytest.mark.parametrize("hangs", [False, True])
async def test_a_cancel_from_outside_after_go_waits_a_moment_for_the_last_byte(
    hangs: bool, mock_clock: MockClock
) -> None:
    """Or a reader would have "go" and no end of the stream, and the guest would be nowhere."""
    machine = machine_with_pages()
    cancelled = trio.Event()
    sink = Reader(trio.sleep_forever if hangs else cancelled.wait)
    # The moment is over where nothing more comes, and lasts where something does.
    on_phase = time_from(Phase.HANDED_OVER, mock_clock) if hangs else None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(OutgoingMigration(machine, Given(sink), on_phase=on_phase).run)
        await sink.closing.wait()
        nursery.cancel_scope.cancel()
        cancelled.set()
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
    assert not any(isinstance(event, stream.Signal) for event in received(bytes(sink.data))[1]), "no go"
