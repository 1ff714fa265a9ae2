"""QEMU's names for what a machine and its migration do: run states, and statuses of migrations."""

from __future__ import annotations

from typing import Literal, TypeAlias

from kvmmig.machine import Machine, State
from kvmmig.machine.cpu import Ending
from kvmmig.migration.phases import Phase

MigrationStatus: TypeAlias = Literal[
    "setup", "active", "pre-switchover", "device", "completed", "failed", "cancelling", "cancelled"
]

#: The migration holds the guest stopped: nobody else may start or stop it.
SWITCHING_OVER = frozenset({Phase.PRE_SWITCHOVER, Phase.STOP, Phase.FINAL, Phase.COMMIT, Phase.HANDED_OVER})

_STATUS: dict[Phase, MigrationStatus] = {
    Phase.SETUP: "setup",
    Phase.ROUNDS: "active",
    Phase.PRE_SWITCHOVER: "pre-switchover",
    Phase.STOP: "device",
    Phase.FINAL: "device",
    Phase.COMMIT: "device",
    Phase.HANDED_OVER: "device",
    Phase.DONE: "completed",
    Phase.FAILED: "failed",
    Phase.CANCELLED: "cancelled",
    Phase.UNKNOWN: "failed",
}


def status_of(phase: Phase) -> MigrationStatus:
    """The status of a migration in this phase."""
    return _STATUS[phase]


def run_state(machine: Machine | None, *, incoming: bool, phase: Phase | None) -> str:
    """What a machine does.

    ``incoming``: its guest comes, or came, by migration. ``phase``: of the migration away that runs.
    """
    if machine is None:
        return "inmigrate" if incoming else "prelaunch"
    match machine.state:
        case State.RUNNING:
            return "running"
        case State.CREATED:
            return "prelaunch"
        case State.PAUSED:
            return "finish-migrate" if phase in SWITCHING_OVER else "paused"
        case State.MOVED:
            # "go" has been said. Whether that was heard is seen when the migration has ended.
            return "postmigrate" if phase is None else "finish-migrate"
        case _:
            return "shutdown"


def run_state_at_end(ending: Ending) -> str:
    """What a machine does whose guest has ended."""
    return "guest-panicked" if ending.kind == "crash" else "shutdown"
