"""All commands for one machine: what a `QMPServer` serves."""

from __future__ import annotations

from kvmmig.monitor.commands_machine import add_machine_commands
from kvmmig.monitor.commands_migration import add_migration_commands
from kvmmig.monitor.commands_own import add_own_commands
from kvmmig.monitor.control import MachineControl
from kvmmig.qmp import CommandTable


def commands_for(control: MachineControl) -> CommandTable:
    """The commands that control this machine. `docs/monitor.md` has their arguments and replies."""
    table = CommandTable()
    add_machine_commands(table, control)
    add_migration_commands(table, control)
    add_own_commands(table, control)
    return table
