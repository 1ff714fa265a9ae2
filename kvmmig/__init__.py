"""A tiny KVM virtual machine monitor, and a framework for migrating its guests through pluggable transports.

The public names, imported when they are first used: ``import kvmmig`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from kvmmig.errors import KvmmigError as KvmmigError
    from kvmmig.machine import Machine as Machine
    from kvmmig.machine import MachineConfig as MachineConfig
    from kvmmig.migration.incoming import IncomingMigration as IncomingMigration
    from kvmmig.migration.outgoing import OutgoingMigration as OutgoingMigration
    from kvmmig.migration.policy import DowntimeLimit as DowntimeLimit
    from kvmmig.migration.policy import FirstOf as FirstOf
    from kvmmig.migration.policy import Limits as Limits
    from kvmmig.migration.policy import MaxRounds as MaxRounds
    from kvmmig.migration.registry import transport_for as transport_for
    from kvmmig.migration.report import MigrationStatistics as MigrationStatistics

_HOMES = {
    "KvmmigError": "kvmmig.errors",
    "Machine": "kvmmig.machine",
    "MachineConfig": "kvmmig.machine",
    "IncomingMigration": "kvmmig.migration.incoming",
    "OutgoingMigration": "kvmmig.migration.outgoing",
    "DowntimeLimit": "kvmmig.migration.policy",
    "FirstOf": "kvmmig.migration.policy",
    "Limits": "kvmmig.migration.policy",
    "MaxRounds": "kvmmig.migration.policy",
    "transport_for": "kvmmig.migration.registry",
    "MigrationStatistics": "kvmmig.migration.report",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
