"""The monitor: a machine's QMP server, and a client for it.

The public names, imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvmmig.monitor.client import Event as Event
    from kvmmig.monitor.client import QMPClient as QMPClient
    from kvmmig.monitor.messages import QMPError as QMPError
    from kvmmig.monitor.server import MonitorServer as MonitorServer
    from kvmmig.monitor.session import Session as Session
    from kvmmig.monitor.table import Arguments as Arguments
    from kvmmig.monitor.table import CommandTable as CommandTable

_HOMES = {
    "Arguments": "kvmmig.monitor.table",
    "CommandTable": "kvmmig.monitor.table",
    "Event": "kvmmig.monitor.client",
    "MonitorServer": "kvmmig.monitor.server",
    "QMPClient": "kvmmig.monitor.client",
    "QMPError": "kvmmig.monitor.messages",
    "Session": "kvmmig.monitor.session",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
