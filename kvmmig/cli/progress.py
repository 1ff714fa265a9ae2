"""A migration as a person sees it: a live line on a terminal, plain lines elsewhere, figures at the end."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import trio

from kvmmig.cli.counters import counter_rows
from kvmmig.cli.output import Output
from kvmmig.errors import KvmmigError
from kvmmig.migration.policy import RoundFigures
from kvmmig.migration.report import MigrationStatistics, Phase
from kvmmig.units import format_duration, format_rate, format_size

if TYPE_CHECKING:  # who looks at another process's migration need not wait for numpy
    from kvmmig.migration.outgoing import OutgoingMigration

_PAGE = 4096
_EVERY = 0.1  # seconds between two looks at the figures
_WORTH_SAYING = 0.5  # seconds: what takes less needs no progress line

_PHASES = {
    Phase.SETUP: "connecting to {}",
    Phase.ROUNDS: "sending memory, while the guest runs",
    Phase.STOP: "the guest is being stopped",
    Phase.PRE_SWITCHOVER: "the guest is stopped, and waits to be told to go on",
    Phase.FINAL: "sending what is left",
    Phase.COMMIT: "handing over",
    Phase.HANDED_OVER: "handed over, not yet confirmed",
    Phase.DONE: "done",
}


async def run_with_progress(
    migration: OutgoingMigration,
    output: Output,
    *,
    run: Callable[[], Awaitable[MigrationStatistics]] | None = None,
    indent: str = "",
) -> MigrationStatistics:
    """Show a migration until its end, and return its figures; raises what it failed with.

    ``run`` carries it out, or waits for whoever does.
    """
    lines = PlainLines(lambda line: output.say(indent + line))
    failure: KvmmigError | None = None
    async with trio.open_nursery() as nursery:

        async def look() -> None:
            while True:
                figures = migration.statistics()
                if output.live:
                    output.status(indent + live_line(figures))
                lines.show(figures, events=not output.live)
                await trio.sleep(_EVERY)

        nursery.start_soon(look)
        try:
            await (run or migration.run)()
        except KvmmigError as error:
            failure = error
        finally:
            nursery.cancel_scope.cancel()
            output.status("")
            lines.show(migration.statistics(), events=not output.live)
    if failure is not None:
        raise failure
    return migration.statistics()


def live_line(figures: MigrationStatistics) -> str:
    """All that fits into a terminal's width, the most interesting first."""
    parts = [
        f"round {figures.round}" if figures.phase is Phase.ROUNDS else str(figures.phase),
        f"sent {format_size(figures.sent_bytes)}",
        f"left {format_size(figures.remaining_pages * _PAGE)}",
        f"at {format_rate(figures.rate)}",
    ]
    if figures.rounds:
        parts.append(f"written {format_rate(figures.dirty_rate)}")
    if figures.expected_downtime is not None:
        parts.append(f"downtime {format_duration(figures.expected_downtime)}?")
    parts.append(f"stall {format_duration(figures.worst_stall)}")
    parts += [f"{name} {value}" for name, value in counter_rows(figures.counters)]
    return " | ".join(parts)


class PlainLines:
    """Turns figures into lines, one for each phase and each round, however seldom they are looked at."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._seen = -1.0
        self._rounds = 0
        self._notices = 0

    def show(self, figures: MigrationStatistics, *, events: bool) -> None:
        """Say what has happened since the last call; without ``events``, only the transport's notices."""
        for notice in figures.notices[self._notices :]:
            self._say(f"kvmmig: {notice}")
        self._notices = len(figures.notices)
        if not events:
            return
        for event in figures.events:
            if event.at <= self._seen:
                continue
            self._seen = event.at
            if event.what in _PHASES:
                self._say(f"{event.at:8.3f} s  {_PHASES[Phase(event.what)].format(figures.peer)}")
            elif event.what.startswith("round ") and self._rounds < len(figures.rounds):
                self._say(f"{event.at:8.3f} s  {_round_line(figures.rounds[self._rounds])}")
                self._rounds += 1
            elif event.what.startswith("final pass") and figures.final_pass is not None:
                self._say(f"{event.at:8.3f} s  {_final_line(figures.final_pass)}")


def _round_line(figures: RoundFigures) -> str:
    return (
        f"round {figures.round}: {format_size(figures.sent_bytes)} sent at {format_rate(figures.rate)}, "
        f"{format_size(figures.remaining_bytes)} written meanwhile"
    )


def _final_line(figures: RoundFigures) -> str:
    return f"final pass: {format_size(figures.sent_bytes)} sent at {format_rate(figures.rate)}"


_HELD_BACK = {
    "link": "the link: bytes went as fast as it took them",
    "disk": "the disk: bytes went as fast as it took them",
    "CPU": "the CPU: others had it, or pages took it",
    "limit": "the limit on its bandwidth",
    "guest": "the guest: it wrote on, so more was sent again than the first time",
}


def waited_for_cpu(figures: MigrationStatistics) -> str:
    """What a person should know of figures that are otherwise hard to believe; empty where it is little.

    The kernel counts for each thread how long it wanted to run and had no CPU. What this host's own
    hypervisor takes it counts elsewhere, for all CPUs together.
    """
    said = []
    for seconds, who in ((figures.loop_waited, "the event loop"), (figures.vcpus_waited, "the vCPUs")):
        if seconds is not None and seconds > figures.total_time / 20:
            said.append(f"{who} waited {format_duration(seconds)} for a CPU that others had")
    if figures.stolen is not None and figures.stolen > figures.total_time / 20:
        said.append(f"this host's own hypervisor took {format_duration(figures.stolen)} of CPU time away")
    return "; ".join(said)


def summary(figures: MigrationStatistics, *, verb: str = "moved") -> str:
    """The figures of a finished migration, a small block; the guest has ``verb`` somewhere."""
    steps = figures.steps
    rows = [
        (
            "sent",
            f"{format_size(figures.sent_bytes)} in {_passes(len(figures.rounds))}",
        ),
        ("pages", f"{figures.sent_pages}, and {figures.zero_pages} that are zero"),
        ("total time", f"{format_duration(figures.total_time)}, setup {_duration(figures.setup_time)}"),
        (
            "downtime",
            _duration(figures.downtime)
            + (f", expected {_duration(figures.expected_downtime)}" if figures.rounds else "")
            + (f" ({figures.surprise})" if figures.surprise else ""),
        ),
        *((("first round", format_rate(figures.rounds[0].rate)),) if figures.rounds else ()),
        (
            "steps",
            f"{steps.count}, each to end after {format_duration(figures.step_bound)}; the worst took "
            f"{format_duration(steps.worst)}, 99 % at most {format_duration(steps.p99)}",
        ),
        ("worst stall", f"{format_duration(figures.worst_stall)} of the event loop"),
    ]
    rows += counter_rows(figures.counters)
    if figures.final_pass is not None:
        row = ("final pass", _final_line(figures.final_pass).removeprefix("final pass: "))
        rows.insert([name for name, _ in rows].index("steps"), row)
    if figures.held_back is not None:
        rows.append(("held back by", _HELD_BACK[figures.held_back]))
    if waited := waited_for_cpu(figures):
        rows.append(("no CPU", waited))
    width = max(len(name) for name, _ in rows)
    lines = (f"  {name:<{width}}  {text}" for name, text in rows)
    return "\n".join([f"kvmmig: the guest has {verb} to {figures.peer}", *lines])


def _passes(rounds: int) -> str:
    if not rounds:
        return "one pass, with the guest stopped"
    return f"{rounds} round{'s' if rounds != 1 else ''} and the final pass"


def _duration(seconds: float | None) -> str:
    return "unknown" if seconds is None else format_duration(seconds)
