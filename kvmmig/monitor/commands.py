"""All commands for one machine: what a `QMPServer` serves."""

from __future__ import annotations

from kvmmig.monitor.commands_human import add_human_commands
from kvmmig.monitor.commands_machine import add_machine_commands
from kvmmig.monitor.commands_migration import add_migration_commands
from kvmmig.monitor.commands_own import add_own_commands
from kvmmig.monitor.control import MachineControl
from kvmmig.monitor.events import EVENTS
from kvmmig.qmp import CommandTable, NoArguments, Session
from kvmmig.qmp.introspection import describe


def commands_for(control: MachineControl) -> CommandTable:
    """The commands that control this machine. `docs/monitor.md` has their arguments and replies."""
    table = CommandTable()
    add_machine_commands(table, control)
    add_migration_commands(table, control)
    add_own_commands(table, control)
    add_human_commands(table, control)

    @table.command("query-qmp-schema")
    async def query_qmp_schema(session: Session, arguments: NoArguments) -> object:
        return describe(table, EVENTS)

    return table
