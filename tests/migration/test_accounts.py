"""Figures that are true: rates are of one moment, and what took the time is named."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import trio

from kvmmig.migration import accounts
from kvmmig.migration.accounts import LiveRate, Waits, held_back, run_delay
from kvmmig.migration.outgoing import OutgoingMigration
from kvmmig.migration.policy import MaxRounds

from .fakes import POLITE, Conversation, Given, Sink, machine_with_pages


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


async def test_a_rounds_rate_is_its_bytes_by_its_duration_and_the_final_pass_is_a_row() -> None:
    machine = machine_with_pages()
    migration = OutgoingMigration(machine, Given(Conversation(POLITE)), policy=MaxRounds(2))
    figures = await migration.run()
    assert figures.final_pass is not None
    rows = (*figures.rounds, figures.final_pass)
    assert [row.round for row in rows] == [0, 1, 2]
    for row in rows:
        assert row.rate == pytest.approx(row.sent_bytes / row.duration)
    assert figures.downtime == pytest.approx(sum(figures.downtime_parts.values()))
    assert set(figures.downtime_parts) == {"pause", "state", "dirty log", "memory", "handing over"}


async def test_what_goes_one_way_is_flushed_while_the_guest_runs() -> None:
    machine = machine_with_pages()
    running_at_flush: list[str] = []

    class Noting(Sink):
        async def flush(self) -> None:
            await super().flush()
            running_at_flush.append(str(machine.state))

    await OutgoingMigration(machine, Given(Noting(), stores=True), policy=MaxRounds(1)).run()
    assert running_at_flush == ["is running", "is paused"]


@pytest.mark.parametrize(
    ("word", "changes"),
    [
        ("link", {}),
        ("disk", {"stores": True}),
        ("guest", {"later": 101.0}),
        ("limit", {"waits": Waits(channel=1.0, limit=3.0)}),
        ("CPU", {"delayed": 3.0}),
        ("CPU", {"waits": Waits(channel=1.0, pages=2.0)}),
    ],
)
def test_one_word_says_what_held_it_back(word: str, changes: dict[str, object]) -> None:
    known: dict[str, object] = {
        "waits": Waits(channel=5.0),
        "first": 100.0,
        "later": 50.0,
        "delayed": 0.1,
        "elapsed": 10.0,
        "stores": False,
        **changes,
    }
    waits = known.pop("waits")
    assert isinstance(waits, Waits)
    assert held_back(waits, **known) == word  # type: ignore[arg-type]  # the table above has the types


def test_the_live_rate_is_that_of_the_last_second(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(accounts, "perf_counter", clock)
    live, sent = LiveRate(), 0
    assert live.rate(0) is None
    live.begin(0)
    assert live.rate(0) is None, "it is too early to say"
    for rate in (100, 1000):
        for _ in range(400):
            clock.now += 0.01
            sent += rate // 100
            live.mark(sent)
        assert live.rate(sent) == pytest.approx(rate, rel=0.1)
    clock.now += 9.0
    assert live.rate(sent) == pytest.approx(100, rel=0.1), "it stands still, and no step says so"


def test_a_thread_that_ran_has_an_account_and_one_that_is_gone_has_none() -> None:
    assert run_delay([threading.get_native_id()]) >= 0.0
    assert run_delay([2**30]) == 0.0


async def test_a_downtime_that_was_not_as_expected_is_explained() -> None:
    migration = OutgoingMigration(machine_with_pages(), Given(Conversation(POLITE)), policy=MaxRounds(1))
    with trio.fail_after(60):
        figures = await migration.run()
    last = replace(figures.rounds[-1], dirty_pages=2560, link_rate=100 << 20, overhead=0.01)
    expected = last.expected_downtime
    assert expected == pytest.approx(0.11)
    assert figures.final_pass is not None

    def surprise(downtime: float, sent: int, duration: float, **parts: float) -> str:
        assert figures.final_pass is not None
        final = replace(figures.final_pass, sent_bytes=sent, duration=duration, rate=sent / duration)
        return replace(
            figures,
            rounds=(last,),
            final_pass=final,
            expected_downtime=expected,
            downtime=downtime,
            downtime_parts=parts,
        ).surprise

    assert surprise(0.12, 10 << 20, 0.11, memory=0.11) == ""
    assert surprise(0.31, 10 << 20, 0.10, memory=0.1, state=0.2) == "state: 200 ms"
    assert "the guest wrote 10 MiB more" in surprise(0.21, 20 << 20, 0.20, memory=0.2)
    assert "went at 52.4 MB/s, those before them at 105 MB/s" in surprise(0.21, 10 << 20, 0.20, memory=0.2)
