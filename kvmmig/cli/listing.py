"""``kvmmig ls`` and ``kvmmig status``: what runs, and what it does."""

from __future__ import annotations

from typing import Any

import trio
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from kvmmig.cli import rundir
from kvmmig.cli.columns import Column, fitted
from kvmmig.cli.counters import counter_rows
from kvmmig.cli.display import figures_block, phase_words
from kvmmig.cli.holder import holder
from kvmmig.cli.lifetime import run_to_end
from kvmmig.cli.printing import console_for_tables, echo, echo_json, words
from kvmmig.cli.remote import has_ended, machine, migration_figures
from kvmmig.errors import ChannelBroken, KvmmigError
from kvmmig.migration.report import MigrationStatistics, Phase
from kvmmig.qmp.client import QMPClient
from kvmmig.units import format_duration, format_rate, format_size

_PATIENCE = 2.0  # seconds that a machine may take to answer
_LOOK = 0.2
_LOOK_JSON = 1.0


def list_machines(*, as_json: bool) -> int:
    """A row for each machine; returns 0."""

    async def command() -> int:
        rundir.clean()
        found: dict[str, dict[str, Any]] = {}

        async def ask(name: str) -> None:
            try:
                async with machine(name, timeout=_PATIENCE) as client:
                    with trio.fail_after(_PATIENCE):
                        found[name] = await _about(client, name)
            except (KvmmigError, trio.TooSlowError):
                found[name] = _silent(name)

        async with trio.open_nursery() as nursery:
            for name in rundir.names():
                nursery.start_soon(ask, name)
        rows = [found[name] for name in sorted(found)]
        if as_json:
            echo_json(rows, indent=True)
        elif rows:
            out = console_for_tables()
            out.print(fitted(_COLUMNS, [_cells(about) for about in rows], out))
        else:
            echo("kvmmig: no machine runs; start one with: kvmmig run dirtier --name a --detach", err=True)
        return 0

    return run_to_end(command)


def show_status(name: str, *, watch: bool, as_json: bool) -> int:
    """The state of one machine, once or again and again; returns 0. Raises `KvmmigError`."""

    async def command() -> int:
        async with machine(name) as client:
            if not watch:
                about, figures, raw = await _ask(client, name)
                if as_json:
                    echo_json({**about, "migration": raw}, indent=True)
                else:
                    out = console_for_tables()
                    out.print(_status(about, figures, width=min(out.width - 1, 78)))
            elif as_json:
                await _watch_as_json(client, name)
            else:
                await _watch(client, name)
        return 0

    return run_to_end(command)


def _silent(name: str) -> dict[str, Any]:
    """What is known of a machine that says nothing itself."""
    about = {"name": name, "status": "does not answer", "uptime": rundir.uptime(name)}
    pid = holder(name)
    return about if pid is None else {**about, "pid": pid}


async def _about(client: QMPClient, name: str) -> dict[str, Any]:
    return {**await client.execute("x-kvmmig-query-machine"), "uptime": rundir.uptime(name)}


async def _ask(
    client: QMPClient, name: str
) -> tuple[dict[str, Any], MigrationStatistics | None, dict[str, Any]]:
    return await _about(client, name), *await migration_figures(client)


async def _watch_as_json(client: QMPClient, name: str) -> None:
    try:
        while True:
            about, _, raw = await _ask(client, name)
            echo_json({**about, "migration": raw})
            await trio.sleep(_LOOK_JSON)
    except ChannelBroken:  # it has ended
        return


async def _watch(client: QMPClient, name: str) -> None:
    screen = console_for_tables()
    if not screen.is_terminal:
        await _watch_as_lines(client, name)
        return
    # On a screen of its own, a terminal that is resized is drawn anew.
    with Live(console=screen, auto_refresh=False, screen=True) as live:
        try:
            while True:
                about, figures, _ = await _ask(client, name)
                hint = Text("Ctrl-C leaves this; the machine goes on", style="dim")
                live.update(
                    Group(_status(about, figures, width=min(screen.width - 1, 78)), Text(), hint),
                    refresh=True,
                )
                await trio.sleep(_LOOK)
        except ChannelBroken:
            pass
    echo(f"kvmmig: {name!r} has ended", err=True)


async def _watch_as_lines(client: QMPClient, name: str) -> None:
    last = ""
    try:
        while True:
            about, figures, _ = await _ask(client, name)
            line = f"{name}: {about['status']}"
            if figures is not None:
                line += f"; migration to {figures.peer}: {phase_words(figures)}"
            if line != last:
                echo(line)
                last = line
            await trio.sleep(_LOOK)
    except ChannelBroken:
        return


def _status(about: dict[str, Any], figures: MigrationStatistics | None, *, width: int) -> RenderableType:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _about_rows(about):
        table.add_row(name, value)
    if figures is None:
        return table
    if not has_ended(figures):
        return Group(table, Text(), figures_block(figures, figures.peer, width=min(width, 62)))
    table.add_row("migration", words(_ended(figures)))
    for counter, count in counter_rows(figures.counters):
        table.add_row(words(counter), count)
    return table


def _about_rows(about: dict[str, Any]) -> list[tuple[str, Text]]:
    rows = [
        ("machine", about["name"]),
        ("guest", about.get("guest") or "-"),
        ("state", about["status"]),
        *(
            [("comes from", about["incoming"])]
            if about["status"] == "inmigrate" and "incoming" in about
            else []
        ),
        ("memory", format_size(about["memory"]) if about.get("memory") else "-"),
        ("vCPUs", str(about.get("cpus") or "-")),
        ("process", str(about["pid"])),
        ("runs for", _age(about.get("uptime"))),
    ]
    return [(name, words(value)) for name, value in rows]


def _ended(figures: MigrationStatistics) -> str:
    if figures.phase is not Phase.DONE:
        return figures.error or phase_words(figures)
    downtime = format_duration(figures.downtime) if figures.downtime is not None else "unknown"
    return (
        f"to {figures.peer}: {format_size(figures.sent_bytes)} in {format_duration(figures.total_time)} "
        f"({format_rate(figures.sent_bytes / max(figures.total_time, 1e-9))}), downtime {downtime}, "
        f"worst stall {format_duration(figures.worst_stall)}"
    )


_COLUMNS = (
    Column("NAME"),
    Column("STATE"),
    Column("GUEST", importance=2),
    Column("MEMORY", importance=3),
    Column("VCPUS", importance=5),
    Column("PID", importance=4),
    Column("UPTIME", importance=1),
)


def _cells(about: dict[str, Any]) -> tuple[str, ...]:
    return (
        about["name"],
        about["status"],
        about.get("guest") or "-",
        format_size(about["memory"]) if about.get("memory") else "-",
        str(about.get("cpus") or "-"),
        str(about.get("pid") or "-"),
        _age(about.get("uptime")),
    )


def _age(seconds: float | None) -> str:
    return "-" if seconds is None else format_duration(int(seconds))
