"""A migration in another process: a live block on a terminal, lines in a pipe, JSON for programs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from rich.console import Group
from rich.constrain import Constrain
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from kvmmig.cli.counters import counter_rows
from kvmmig.cli.printing import console, echo, echo_json, words
from kvmmig.cli.progress import PlainLines
from kvmmig.migration.phases import PHASES
from kvmmig.migration.report import MigrationStatistics, Phase
from kvmmig.units import format_duration, format_rate, format_size

_PAGE = 4096
_WIDEST = 62  # columns: so a terminal may become narrower, and nothing that stands there is wrapped
_CONVERGES = 1.05  # faster than the guest writes by so much: below that, how long it takes is anybody's guess

_PHASES = {
    Phase.SETUP: "connecting",
    Phase.ROUNDS: "round {}, the guest runs",
    Phase.STOP: "the guest is being stopped",
    Phase.PRE_SWITCHOVER: "the guest is stopped, and waits",
    Phase.FINAL: "the guest is stopped, the rest is sent",
    Phase.COMMIT: "handing over",
    Phase.HANDED_OVER: "handed over, not yet confirmed",
    Phase.DONE: "has moved",
    Phase.FAILED: "failed",
    Phase.CANCELLED: "cancelled",
    Phase.UNKNOWN: "nobody knows whether it has moved",
}


class Display:
    """Shows figures as they come, inside a ``with`` block; this one shows nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def show(self, figures: MigrationStatistics, raw: Mapping[str, Any]) -> None:
        """The figures as they are now; ``raw`` is what the monitor has sent."""

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Out of the way, for a question."""
        yield


class Lines(Display):
    """A line for each phase and each round."""

    def __init__(self) -> None:
        self._lines = PlainLines(echo)

    def show(self, figures: MigrationStatistics, raw: Mapping[str, Any]) -> None:
        self._lines.show(figures, events=True)


class JsonLines(Display):
    """All figures, a line each time; the timeline and the histograms only in the last one."""

    def show(self, figures: MigrationStatistics, raw: Mapping[str, Any]) -> None:
        echo_json(raw if PHASES[figures.phase].is_end else _brief(raw))


def _brief(raw: Mapping[str, Any]) -> dict[str, Any]:
    brief = {name: value for name, value in raw.items() if name not in ("events", "rounds")}
    for name in ("steps", "turns"):
        brief[name] = {key: value for key, value in raw[name].items() if key != "buckets"}
    return brief


class LiveBlock(Display):
    """A few lines that stay where they are, and change."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._console = console()
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._drawn = 0
        self._notices = 0
        self._hidden = False

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def show(self, figures: MigrationStatistics, raw: Mapping[str, Any]) -> None:
        for notice in figures.notices[self._notices :]:
            self._console.print(words(f"kvmmig: {notice}"))
        self._notices = len(figures.notices)
        if self._hidden:
            return
        columns = self._console.width
        if columns < self._drawn:  # the terminal has wrapped what stood there: nobody knows where
            self._console.clear()
        self._drawn = min(columns - 1, _WIDEST)
        self._live.update(figures_block(figures, self._uri, width=self._drawn), refresh=True)

    @contextmanager
    def hidden(self) -> Iterator[None]:
        self._live.update(Text(""), refresh=True)
        self._live.stop()
        self._hidden = True
        try:
            yield
        finally:
            self._hidden = False
            self._live.start()


def figures_block(figures: MigrationStatistics, uri: str, *, width: int) -> Constrain:
    """The figures of a migration that runs, ``width`` columns wide."""
    done = share_done(figures)
    bar = Table.grid(padding=(0, 1), expand=False)
    bar.add_row(ProgressBar(total=100, completed=done, width=width - 8), f"{done:3} %")
    block = Group(
        _shortened(f"to {uri}", width),
        _shortened(phase_words(figures), width),
        bar,
        _pairs(figures, width),
        *_counters(figures),
    )
    return Constrain(block, width)


def phase_words(figures: MigrationStatistics) -> str:
    """What a migration is doing, in a few words."""
    return _PHASES[figures.phase].format(figures.round)


def time_left(figures: MigrationStatistics) -> str:
    """How long it will take yet, as far as that can be told."""
    remaining = figures.remaining_pages * _PAGE
    speed = figures.rate - (figures.dirty_rate if figures.phase is Phase.ROUNDS else 0.0)
    if figures.rate <= 0 or figures.phase not in (Phase.ROUNDS, Phase.FINAL):
        return "-"
    if speed < figures.rate * (_CONVERGES - 1):
        return "no end in sight"
    seconds = remaining / speed
    return f"about {format_duration(round(seconds, 1))}" if seconds < 60 else f"about {seconds / 60:.0f} min"


def figure_pairs(figures: MigrationStatistics) -> list[tuple[str, str]]:
    """The figures that a person watches, each with its name, in the order of reading."""
    if figures.downtime is not None:
        downtime = format_duration(figures.downtime)
    elif figures.expected_downtime is not None:
        downtime = f"{format_duration(figures.expected_downtime)} expected"
    else:
        downtime = "-"
    return [
        ("sent", format_size(figures.sent_bytes)),
        ("remaining", format_size(figures.remaining_pages * _PAGE)),
        ("rate", format_rate(figures.rate)),
        ("dirty rate", format_rate(figures.dirty_rate) if figures.rounds else "-"),
        ("downtime", downtime),
        ("worst stall", format_duration(figures.worst_stall)),
        ("elapsed", format_duration(figures.total_time)),
        ("time left", time_left(figures)),
    ]


def share_done(figures: MigrationStatistics) -> int:
    """Per cent of the guest's pages that are not pending."""
    total = figures.total_pages or 1
    done = total - figures.remaining_pages if figures.phase is not Phase.SETUP else 0
    return 100 * done // total


def _pairs(figures: MigrationStatistics, width: int) -> Table:
    pairs = figure_pairs(figures)
    table = Table.grid(padding=(0, 2, 0, 0))
    narrow = width < 50
    for _ in range(2 if narrow else 4):
        table.add_column(no_wrap=True, overflow="ellipsis")
    for (name, value), (other, another) in zip(pairs[::2], pairs[1::2], strict=True):
        if narrow:
            table.add_row(name, value)
            table.add_row(other, another)
        else:
            table.add_row(name, f"{value:<17}", other, another)
    return table


def _counters(figures: MigrationStatistics) -> list[Table]:
    if not figures.counters:
        return []
    table = Table.grid(padding=(0, 2, 0, 0))
    for _ in range(2):
        table.add_column(no_wrap=True, overflow="ellipsis")
    for name, value in counter_rows(figures.counters):
        table.add_row(words(name), value)
    return [table]


def _shortened(text: str, width: int) -> Text:
    line = words(text)
    line.no_wrap, line.overflow = True, "ellipsis"
    line.truncate(max(width, 10), overflow="ellipsis")
    return line
