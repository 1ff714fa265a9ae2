"""The demo's migrations and what became of them, as a table."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.text import Text

from kvmmig.cli.columns import Column, fitted
from kvmmig.cli.printing import console, words
from kvmmig.cli.progress import waited_for_cpu
from kvmmig.migration.report import MigrationStatistics
from kvmmig.transport import TransportURI
from kvmmig.units import format_duration, format_rate, format_size

_PLAIN_WIDTH = 132  # of the table where there is no terminal
VERIFIED = "verified"


@dataclass(frozen=True, slots=True)
class Case:
    """One of the demo's migrations."""

    name: str
    description: str  # what its guest does, as a clause
    uri: TransportURI
    saved: str = ""  # the file; empty when the guest moves straight to the other process


@dataclass(slots=True)
class Row:
    """What became of it."""

    case: Case
    figures: MigrationStatistics | None = None
    pages: int = 0
    passes: str = ""
    verdict: str = VERIFIED
    bare_loop: float | None = None  # seconds that a bare loop woke up too late at most, meanwhile


def stopped_for(row: Row) -> str:
    """How long the guest ran nowhere."""
    downtime = row.figures.downtime if row.figures else None
    return "-" if downtime is None else format_duration(downtime)


_COLUMNS = (
    Column("transport"),
    Column("rounds", importance=6, right=True),
    Column("sent", importance=5, right=True),
    Column("total", importance=3, right=True),
    Column("stopped for", importance=1, right=True),
    Column("rate", importance=4, right=True),
    Column("worst step", importance=2, right=True),
    Column("worst stall", importance=7, right=True),
    Column("pages verified", importance=8, right=True),
    Column("passes", importance=9, right=True),
    Column("verdict"),
)


def print_table(rows: list[Row]) -> None:
    """The rows on standard output, and below them what failed and what a figure means."""
    out = console(width=None if os.isatty(1) else _PLAIN_WIDTH)
    cells: list[Sequence[str | Text]] = [
        (row.case.name, *_figures(row), str(row.pages), row.passes, _verdict(row)) for row in rows
    ]
    out.print(fitted(_COLUMNS, cells, out, framed=True))
    for row in rows:
        for note in _notes(row):
            out.print(words(f"{row.case.name}: {note}"), soft_wrap=not out.is_terminal)
        if row.verdict != VERIFIED:
            said = words(f"{row.case.name}: {row.verdict}", "bold red")
            out.print(said, soft_wrap=not out.is_terminal)


def _notes(row: Row) -> Iterator[str]:
    figures = row.figures
    if figures is None:
        return
    if figures.steps.worst > figures.step_bound and row.bare_loop is not None:
        yield (
            f"its worst step took {format_duration(figures.steps.worst)}, and a step is to take "
            f"{format_duration(figures.step_bound)}; beside it on this host, a loop that only sleeps woke up "
            f"to {format_duration(row.bare_loop)} late"
        )
    if waited := waited_for_cpu(figures):
        yield waited


def row_as_json(row: Row) -> dict[str, object]:
    """The same for programs: bytes, seconds, bytes a second. What there is no figure of is null."""
    figures = row.figures
    return {
        "transport": row.case.name,
        "verdict": row.verdict,
        "verified-pages": row.pages,
        "passes": row.passes,
        "rounds": len(figures.rounds) if figures else None,
        "sent-bytes": figures.sent_bytes if figures else None,
        "total-time": figures.total_time if figures else None,
        "downtime": figures.downtime if figures else None,
        "rate": figures.rounds[0].rate if figures and figures.rounds else None,
        "worst-step": figures.steps.worst if figures else None,
        "step-bound": figures.step_bound if figures else None,
        "worst-stall": figures.worst_stall if figures else None,
        "bare-loop-worst-lateness": row.bare_loop,
        "stolen": figures.stolen if figures else None,
    }


def _figures(row: Row) -> tuple[str, ...]:
    figures = row.figures
    if figures is None:
        return ("-",) * 7
    return (
        str(len(figures.rounds)),
        format_size(figures.sent_bytes),
        format_duration(figures.total_time),
        stopped_for(row),
        format_rate(figures.rounds[0].rate) if figures.rounds else "-",
        format_duration(figures.steps.worst),
        format_duration(figures.worst_stall),
    )


def _verdict(row: Row) -> Text:
    return Text(VERIFIED, "bold green") if row.verdict == VERIFIED else Text("FAILED", "bold red")
