"""Ctrl-C while a command is on its way to a machine, which a fake one makes last."""

from __future__ import annotations

import re
import types
from pathlib import Path
from typing import Any

import trio

from kvmmig.cli import rundir
from kvmmig.migration.outgoing import OutgoingMigration
from kvmmig.monitor.replies import migration_figures
from kvmmig.qmp import Arguments, CommandTable, QMPServer, Session
from kvmmig.testing.machine import FakeMachine

from .conftest import Kvmmig


class Target(Arguments, frozen=True):
    uri: str


async def asleep(pid: int) -> int:
    """Wait until a process waits; returns how often it has done so: once more when a signal has woken it."""
    while True:
        status = Path(f"/proc/{pid}/status").read_text()  # noqa: ASYNC240 - it is no disk
        if re.search(r"^State:\s+S", status, re.MULTILINE):
            break
        await trio.sleep(0.001)
    found = re.search(r"^voluntary_ctxt_switches:\s+(\d+)", status, re.MULTILINE)
    assert found is not None
    return int(found[1])


async def test_a_ctrl_c_while_the_migration_is_being_begun_cancels_it(
    kvmmig: Kvmmig, nursery: trio.Nursery
) -> None:
    """It may have begun, so to just go away would leave it running."""
    asked, interrupted = trio.Event(), trio.Event()
    migration = OutgoingMigration(FakeMachine(), "tcp:127.0.0.1:1")
    outgoing = types.SimpleNamespace(migration=migration, status="active")
    control: Any = types.SimpleNamespace(outgoing=outgoing)
    phase = "rounds"
    table = CommandTable()

    @table.command("migrate", Target)
    async def migrate(session: Session, _: object) -> None:
        asked.set()
        await interrupted.wait()

    @table.command("migrate_cancel")
    async def migrate_cancel(session: Session, _: object) -> None:
        nonlocal phase
        phase = "cancelled"

    @table.command("x-kvmmig-query-migration")
    async def query(session: Session, _: object) -> object:
        return {**migration_figures(control), "phase": phase}

    @table.command("query-status")
    async def query_status(session: Session, _: object) -> object:
        return {"status": "running", "running": True}

    monitor = rundir.files_of("a").monitor
    rundir.directory().mkdir(mode=0o700)
    server = QMPServer(table, version="kvmmig 0.4.1")
    with trio.fail_after(60):
        await nursery.start(server.serve, f"unix:{monitor}")
        command = kvmmig.start("migrate", "a", "tcp:127.0.0.1:1")
        await asked.wait()
        before = await asleep(command.pid)
        command.interrupt()
        while await asleep(command.pid) == before:  # noqa: ASYNC110 - a signal is told to nobody
            await trio.sleep(0.01)
        interrupted.set()
        status = await trio.to_thread.run_sync(command.end)
    assert "the guest of 'a' is here as before: running" in command.stderr
    assert status == 130
