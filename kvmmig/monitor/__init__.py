"""One machine under control, and QEMU's commands for it, which any QMP client may give.

The public names, imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvmmig.monitor.commands import commands_for as commands_for
    from kvmmig.monitor.control import MachineControl as MachineControl
    from kvmmig.monitor.control import Outcome as Outcome
    from kvmmig.monitor.dirty_rate import DirtyRate as DirtyRate
    from kvmmig.monitor.incoming import Incoming as Incoming
    from kvmmig.monitor.monitor import Monitor as Monitor
    from kvmmig.monitor.outgoing import Outgoing as Outgoing
    from kvmmig.monitor.parameters import MigrationSettings as MigrationSettings

_HOMES = {
    "DirtyRate": "kvmmig.monitor.dirty_rate",
    "Incoming": "kvmmig.monitor.incoming",
    "MachineControl": "kvmmig.monitor.control",
    "MigrationSettings": "kvmmig.monitor.parameters",
    "Monitor": "kvmmig.monitor.monitor",
    "Outcome": "kvmmig.monitor.control",
    "Outgoing": "kvmmig.monitor.outgoing",
    "commands_for": "kvmmig.monitor.commands",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
