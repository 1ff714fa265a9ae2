"""The record: what happened in a migration, as events that a later reader understands."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeVar

import pytest
import trio

from kvmmig.errors import MigrationError
from kvmmig.migration.events import (
    KINDS,
    AnyEvent,
    Begun,
    Changed,
    Decided,
    DirtyLogRead,
    Ended,
    EventsLost,
    GuestStarted,
    PagesMapped,
    PhaseBegun,
    Received,
    RecordedEvent,
    RoundSent,
    Sent,
    Stalled,
    StepTaken,
    SwitchedOver,
    decode_line,
    encode_lines,
)
from kvmmig.migration.incoming import IncomingMigration
from kvmmig.migration.outgoing import OutgoingMigration
from kvmmig.migration.policy import Limits, MaxRounds
from kvmmig.migration.recordfile import recording
from kvmmig.testing.machine import FakeMachine

from .fakes import POLITE, Conversation, Given, Sink, machine_with_pages

T = TypeVar("T", bound=RecordedEvent)
ROOT = Path(__file__).parents[2]


def events_of(path: Path) -> list[AnyEvent]:
    lines = [decode_line(line) for line in path.read_bytes().splitlines()]
    return [line[1] for line in lines if line is not None]


def of_kind(kind: type[T], events: list[AnyEvent]) -> list[T]:
    return [event for event in events if isinstance(event, kind)]


async def recorded(
    sink: Sink, path: Path, *, limits: Limits | None = None, stores: bool = False
) -> tuple[list[AnyEvent], OutgoingMigration]:
    migration = OutgoingMigration(
        machine_with_pages(),
        Given(sink, stores=stores),
        policy=MaxRounds(2),
        limits=limits,
        record=path,
    )
    with trio.fail_after(60):
        await migration.run()
    return events_of(path), migration


async def test_the_rounds_and_the_final_pass_have_every_byte_but_the_hello_and_go(tmp_path: Path) -> None:
    sink = Sink()
    events, migration = await recorded(sink, tmp_path / "a.jsonl")
    rounds = of_kind(RoundSent, events)
    assert [(each.round, each.final) for each in rounds] == [(0, False), (1, False), (2, True)]
    sent = of_kind(Sent, events)
    assert sum(each.sent_bytes for each in sent) == len(sink.data) == migration.statistics().sent_bytes
    before = sum(each.sent_bytes for each in sent if each.at < rounds[0].at)
    after = sum(each.sent_bytes for each in sent if each.at > rounds[-1].at + rounds[-1].duration)
    assert sum(each.sent_bytes for each in rounds) + before + after == len(sink.data)
    steps = of_kind(StepTaken, events)
    assert sum(each.sent_bytes for each in steps) == len(sink.data)


async def test_the_parts_of_the_downtime_add_up_to_it_and_the_events_stand_in_order(tmp_path: Path) -> None:
    events, migration = await recorded(Sink(), tmp_path / "a.jsonl")
    (switchover,) = of_kind(SwitchedOver, events)
    assert switchover.downtime == pytest.approx(migration.statistics().downtime, abs=1e-3)
    assert isinstance(events[0], Begun)
    assert isinstance(events[-1], Ended)
    assert events[-1].outcome == "done"
    assert [each.phase for each in of_kind(PhaseBegun, events)][:2] == ["setup", "rounds"]
    assert len(of_kind(DirtyLogRead, events)) == 4  # at the begin, after each round, the last one
    assert [each.round for each in of_kind(PagesMapped, events)] == [0, 1]
    assert [each.decision for each in of_kind(Decided, events)] == ["continue", "stop"]


async def test_a_sink_that_takes_nothing_is_a_stall_that_says_what_held_it(tmp_path: Path) -> None:
    silent_until = trio.current_time() + 0.05

    def on_send(room: int) -> int:
        return room if trio.current_time() > silent_until else 0

    events, _ = await recorded(Sink(on_send), tmp_path / "link.jsonl")
    assert [each.held_by for each in of_kind(Stalled, events)][:1] == ["link"]
    silent_until = trio.current_time() + 0.05
    events, _ = await recorded(Sink(on_send), tmp_path / "disk.jsonl", stores=True)
    assert [each.held_by for each in of_kind(Stalled, events)][:1] == ["disk"]


async def test_a_round_says_what_its_time_was_spent_on(tmp_path: Path) -> None:
    machine = FakeMachine()
    for page in range(60):
        machine.write(page, 5)
    path = tmp_path / "a.jsonl"
    machine.exits = {"IoOut": 5}

    def on_send(room: int) -> int:
        machine.exits = {"IoOut": machine.exits["IoOut"] + 1}
        return room

    way = Given(Sink(on_send))
    await OutgoingMigration(
        machine, way, policy=MaxRounds(1), limits=Limits(bandwidth=1e6), record=path
    ).run()
    first = of_kind(RoundSent, events_of(path))[0]
    assert first.bandwidth == 1e6
    assert first.spent["limit"] > 0.5 * first.duration
    assert 0 < first.exits["IoOut"] <= machine.exits["IoOut"] - 5
    assert sum(first.spent.values()) <= first.duration


async def test_what_somebody_changes_meanwhile_is_an_event(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    migration = OutgoingMigration(
        machine_with_pages(), Given(Sink()), policy=MaxRounds(2), record=path, on_round=lambda _: change()
    )

    def change() -> None:
        migration.set_bandwidth(1e9)

    await migration.run()
    assert [(each.what, each.value) for each in of_kind(Changed, events_of(path))][:1] == [
        ("bandwidth", "1000000000.0")
    ]


async def test_two_migrations_share_a_file_and_a_listener_hears_the_same(tmp_path: Path) -> None:
    path, heard = tmp_path / "a.jsonl", list[RecordedEvent]()
    for _ in range(2):
        await OutgoingMigration(
            machine_with_pages(),
            Given(Conversation(POLITE)),
            record=path,
            on_event=heard.append,
        ).run()
    assert events_of(path) == heard
    first, second = of_kind(Begun, events_of(path))
    assert first.stream != second.stream
    assert first.clock == second.clock


@pytest.mark.kvm
async def test_both_sides_are_joined_by_the_streams_identity_and_one_clock(tmp_path: Path) -> None:
    import kvmmig

    path = tmp_path / "a.jsonl"

    async def receive(task_status: trio.TaskStatus[object]) -> None:
        incoming = IncomingMigration(
            "unix:" + str(tmp_path / "s"), on_listening=task_status.started, record=path
        )
        async with incoming.machine():
            pass

    async with kvmmig.open_machine("dirtier", memory="8MiB", settings={"hot": "1MiB"}) as machine:
        await machine.start()
        async with trio.open_nursery() as nursery:
            uri = await nursery.start(receive)
            await kvmmig.migrate(machine, uri, record=path)
    events = events_of(path)
    source, destination = sorted(of_kind(Begun, events), key=lambda each: each.side, reverse=True)
    assert (source.side, destination.side) == ("source", "destination")
    assert (source.stream, source.clock, source.guest) == (
        destination.stream,
        destination.clock,
        "dirtier",
    )
    (started,), (switchover,) = of_kind(GuestStarted, events), of_kind(SwitchedOver, events)
    assert switchover.at < started.at < switchover.at + switchover.downtime
    done = next(each for each in of_kind(Ended, events) if each.step_bound is not None)
    assert sum(each.pages for each in of_kind(Received, events)) == done.pages + done.zero_pages


@pytest.mark.parametrize("place", ["missing/a.jsonl", "fifo", "."])
async def test_a_record_that_cannot_be_written_is_said_before_anything_is_done(
    place: str, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "fifo")
    machine = FakeMachine()
    with pytest.raises(MigrationError, match="the record can't be written to"):
        await OutgoingMigration(machine, Given(Sink()), record=tmp_path / place).run()
    assert machine.throttled == []
    assert not machine.tracker.on


async def test_a_full_disk_costs_the_record_and_not_the_migration() -> None:
    # /dev/full is no regular file, so its descriptor is given as an open of one would be.
    from kvmmig.migration.recordfile import RecordFile

    file = RecordFile("a.jsonl", os.open("/dev/full", os.O_WRONLY))
    file.tell(GuestStarted(at=1.0))
    await trio.to_thread.run_sync(file.close, 10)
    assert file.problem == "the record a.jsonl is not whole: No space left on device"
    file.tell(GuestStarted(at=1.0))


async def test_events_that_the_disk_does_not_take_in_time_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvmmig.migration.recordfile._MOST_WAITING", 3)
    async with recording(tmp_path / "a.jsonl") as file:
        for at in range(1000):
            file.tell(GuestStarted(at=at))
    events = events_of(tmp_path / "a.jsonl")
    assert (
        sum(each.count for each in of_kind(EventsLost, events)) + len(of_kind(GuestStarted, events)) == 1000
    )


def test_an_event_of_a_later_version_is_passed_over_and_nonsense_is_a_sentence() -> None:
    assert decode_line('{"event":"invented-later","at":1}') is None
    assert decode_line('{"event":"guest-started","at":1,"invented-later":2}') == ("", GuestStarted(at=1))
    with pytest.raises(ValueError, match="required field"):
        decode_line("{}")
    with pytest.raises(ValueError, match="malformed"):
        decode_line(b"\xff")


def test_what_is_encoded_is_decoded() -> None:
    event = Stalled(at=1.5, duration=0.25, held_by="disk", words="it waits")
    assert decode_line(encode_lines([event], "source-1")) == ("source-1", event)


def test_the_page_of_the_schema_has_every_event_and_every_field() -> None:
    page = (ROOT / "docs/record.md").read_text()
    for name, kind in KINDS.items():
        row = next((line for line in page.splitlines() if line.startswith(f"| `{name}` |")), "")
        missing = [
            field
            for field in kind.__struct_fields__
            if f"`{field.replace('_', '-')}`" not in row and field != "at"
        ]
        assert row, f"docs/record.md has no row for {name}"
        assert missing == [], f"docs/record.md, {name}: {missing}"
