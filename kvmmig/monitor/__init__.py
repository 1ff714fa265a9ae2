"""The monitor: a machine's QMP server, and a client for it.

The public names, imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvmmig.qmp.client import Event as Event
    from kvmmig.qmp.client import QMPClient as QMPClient
    from kvmmig.qmp.messages import QMPError as QMPError
    from kvmmig.qmp.server import MonitorServer as MonitorServer
    from kvmmig.qmp.session import Session as Session
    from kvmmig.qmp.table import Arguments as Arguments
    from kvmmig.qmp.table import CommandTable as CommandTable

_HOMES = {
    "Arguments": "kvmmig.qmp.table",
    "CommandTable": "kvmmig.qmp.table",
    "Event": "kvmmig.qmp.client",
    "MonitorServer": "kvmmig.qmp.server",
    "QMPClient": "kvmmig.qmp.client",
    "QMPError": "kvmmig.qmp.messages",
    "Session": "kvmmig.qmp.session",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
