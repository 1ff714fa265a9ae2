"""The demo's migrations and what became of them, as a table."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvmmig.cli.printing import words
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


def stopped_for(row: Row) -> str:
    """How long the guest ran nowhere."""
    downtime = row.figures.downtime if row.figures else None
    return "-" if downtime is None else format_duration(downtime)


def table(rows: list[Row]) -> str:
    """The rows drawn as text for standard output, and below them what failed."""
    bound = next((row.figures.step_bound for row in rows if row.figures), 0.0)
    drawn = Table(title="What became of the three guests", title_justify="left")
    drawn.add_column("transport", no_wrap=True)
    for column in ("rounds", "sent", "total", "stopped for", "first round"):
        drawn.add_column(column, justify="right")
    drawn.add_column(f"worst step (bound {format_duration(bound)})", justify="right")
    for column in ("worst loop stall", "pages verified", "passes"):
        drawn.add_column(column, justify="right")
    drawn.add_column("verdict")
    for row in rows:
        drawn.add_row(row.case.name, *_figures(row), str(row.pages), row.passes, _verdict(row))
    text = io.StringIO()
    on_terminal = os.isatty(1)
    console = Console(
        file=text,
        width=None if on_terminal else _PLAIN_WIDTH,
        force_terminal=on_terminal,
        legacy_windows=False,
    )
    console.print(drawn)
    for row in rows:
        if row.figures is not None and (waited := waited_for_cpu(row.figures)):
            console.print(words(f"{row.case.name}: {waited}"), soft_wrap=True)
        if row.verdict != VERIFIED:
            console.print(words(f"{row.case.name}: {row.verdict}", "bold red"), soft_wrap=True)
    return text.getvalue().rstrip("\n")


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
