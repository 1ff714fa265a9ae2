"""Migrations on a terminal of 80 columns, and right after it was resized; and what Ctrl-C means there."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from kvmmig.cli.display import figures_block, phase_words, time_left
from kvmmig.cli.progress import PlainLines, live_line, summary
from kvmmig.migration.phases import PHASES
from kvmmig.migration.policy import RoundFigures
from kvmmig.migration.report import MigrationStatistics, Phase, TimelineEvent
from kvmmig.migration.stall_meter import Durations

from .screens import Screen

SMALL = ("dirtier", "--memory", "32MiB", "--set", "hot=1MiB", "--name", "a")
LABELS = ("sent", "remaining", "rate", "dirty rate", "downtime", "worst stall", "elapsed", "time left")
Command = Callable[..., tuple[int, str, str]]
Background = Callable[..., str]


def figures(
    phase: Phase, *, rate: float, dirty_rate: float, remaining_pages: int, **counters: float
) -> MigrationStatistics:
    none = Durations(count=0, worst=0.0, p99=0.0, p999=0.0, buckets=())
    last = RoundFigures(
        round=0,
        sent_pages=1,
        zero_pages=0,
        sent_bytes=4096,
        duration=1.0,
        dirty_pages=1,
        rate=rate,
        dirty_rate=dirty_rate,
    )
    return MigrationStatistics(
        phase=phase,
        peer="somebody",
        round=1,
        total_pages=262144,
        remaining_pages=remaining_pages,
        sent_pages=0,
        zero_pages=0,
        sent_bytes=10 << 40,
        rate=rate,
        dirty_rate=dirty_rate,
        expected_downtime=12345.6,
        downtime=None,
        setup_time=None,
        total_time=100000.0,
        step_bound=0.01,
        steps=none,
        turns=none,
        worst_turn_ran="",
        loop_waited=None,
        vcpus_waited=None,
        held_back=None,
        downtime_parts={},
        stolen=None,
        bandwidth=None,
        throttle=0.0,
        rounds=(last,),
        final_pass=None,
        events=(),
        notices=(),
        error="",
        counters=counters,
    )


@pytest.mark.parametrize("width", [78, 62, 50, 49, 30])
def test_no_figure_is_too_wide(width: int) -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(
        figures_block(
            figures(
                Phase.ROUNDS, rate=999.9e6, dirty_rate=998.9e6, remaining_pages=262144, **{"x" * 99: 1e300}
            ),
            "tcp:" + "x" * 100,
            width=width,
        )
    )
    rows = console.export_text().splitlines()
    assert max(len(row.rstrip()) for row in rows) <= width


def test_the_time_left_is_said_as_far_as_it_can_be_known() -> None:
    gigabyte = 262144
    assert time_left(figures(Phase.ROUNDS, rate=1 << 30, dirty_rate=1 << 29, remaining_pages=gigabyte)) == (
        "about 2 s"
    )
    assert time_left(figures(Phase.FINAL, rate=1 << 20, dirty_rate=1 << 29, remaining_pages=gigabyte)) == (
        "about 17 min"
    )
    assert (
        time_left(figures(Phase.ROUNDS, rate=1e6, dirty_rate=2e6, remaining_pages=gigabyte))
        == "no end in sight"
    )
    assert time_left(figures(Phase.SETUP, rate=0.0, dirty_rate=0.0, remaining_pages=0)) == "-"


@pytest.mark.parametrize("phase", Phase)
def test_every_phase_has_its_words(phase: Phase) -> None:
    seen = figures(phase, rate=1e6, dirty_rate=2e6, remaining_pages=0)
    assert phase_words(seen)
    if PHASES[phase].is_end and phase is not Phase.DONE:
        return  # those are told by their error
    told: list[str] = []
    event = TimelineEvent(at=0.5, what=str(phase))
    PlainLines(told.append).show(dataclasses.replace(seen, events=(event,)), events=True)
    assert len(told) == 1


def test_what_a_channel_counts_is_shown_in_its_unit_and_only_where_there_is_any() -> None:
    counters = {"zstd.sent-bytes": 3 << 30, "ws.wait-seconds": 0.25, "ws.retransmissions": 12}
    without = figures(Phase.ROUNDS, rate=1e6, dirty_rate=2e6, remaining_pages=0)
    seen = dataclasses.replace(without, counters=counters)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(figures_block(seen, "tcp:x", width=62))
    for text in (console.export_text(), live_line(seen), summary(seen)):
        shown = " ".join(text.split())
        for each in ("zstd.sent-bytes 3 GiB", "ws.wait-seconds 250 ms", "ws.retransmissions 12"):
            assert each in shown
    assert "zstd" not in live_line(without) + summary(without)


@pytest.fixture
def slowly(background: Background, tmp_path: Path) -> str:
    """A machine called ``a`` runs, and this way takes half a minute."""
    background("run", *SMALL)
    return f"throttle+file:{tmp_path}/slow.img?throttle.rate=1MB/s"


@pytest.mark.kvm
def test_the_display_is_whole_at_80_columns_and_after_each_resize(screen: Screen, slowly: str) -> None:
    screen.run("migrate", "a", slowly)
    text = screen.wait_for(lambda text: "round 0, the guest runs" in text and "about" in text)
    assert all(label in text for label in LABELS), text
    assert len(screen.rows()) == 7  # where to, the phase, the bar, four rows of figures
    for columns in (60, 40, 80):
        screen.resize(columns, 24)
        if columns == 40:
            screen.wait_for(lambda text: "dirty rate" in text and not _in_one_row(text, "sent", "remaining"))
        else:
            screen.wait_for(lambda text: _in_one_row(text, "sent", "remaining"))
        assert screen.text().count("time left") == 1, screen.text()
    screen.type(b"\x03")
    screen.wait_for("Cancel the migration?")
    screen.type(b"\x03")
    assert screen.end() == 130
    assert "it was cancelled" in screen.text()


def _in_one_row(text: str, one: str, other: str) -> bool:
    return any(one in row and other in row for row in text.splitlines())


@pytest.mark.kvm
def test_ctrl_c_asks_and_does_what_it_is_told(screen: Screen, slowly: str, command: Command) -> None:
    screen.run("migrate", "a", slowly)
    screen.wait_for("round 0")
    screen.type(b"\x03")
    assert "time left" not in screen.wait_for("Cancel the migration?")
    screen.type(b"\r")  # neither
    screen.wait_for("time left")
    screen.type(b"\x03")
    screen.wait_for(lambda text: text.count("Cancel the migration?") == 2)
    screen.type(b"n\r")
    assert screen.end() == 3
    assert "kvmmig status a --watch" in screen.text()
    assert json.loads(command("status", "a", "--json")[1])["migration"]["phase"] == "rounds"

    screen.run("status", "a", "--watch")
    text = screen.wait_for("time left")
    assert "running" in text
    screen.resize(50, 30)
    screen.wait_for(lambda text: not _in_one_row(text, "sent", "remaining"))
    screen.type(b"\x03")
    assert screen.end() == 130


@pytest.mark.kvm
def test_a_finished_one_leaves_its_figures_and_no_machine(
    screen: Screen, background: Background, command: Command, tmp_path: Path
) -> None:
    background("run", *SMALL)
    screen.run("save", "a", "a.img")
    text = screen.wait_for("kvmmig restore a.img")
    assert screen.end() == 0
    assert "the guest has moved to" in text
    assert "time left" not in text
    assert (tmp_path / "a.img").exists()
    assert command("ls")[1] == ""
