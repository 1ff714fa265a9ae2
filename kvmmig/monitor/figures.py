"""kvmmig's own figures of a migration as JSON has them: in replies, and in the event of its end."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from functools import cache
from typing import Any

from kvmmig.migration.report import MigrationStatistics
from kvmmig.monitor.states import MigrationStatus

#: Rounds, and events, that one reply has at most: making it holds the loop.
_MOST = 200


def figures_reply(figures: MigrationStatistics, status: MigrationStatus | None) -> dict[str, Any]:
    """All of them, in seconds and bytes; the newest rounds and events where there are many."""
    newest = dataclasses.replace(figures, rounds=figures.rounds[-_MOST:], events=figures.events[-_MOST:])
    reply: dict[str, Any] = kebab(newest)
    return {"status": status, **reply, "worst-stall": figures.worst_stall}


def kebab(value: Any) -> Any:
    """A frozen figure as JSON has it, its names with hyphens, as all of QMP's; infinity is null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, tuple | list):
        return [kebab(item) for item in value]
    if isinstance(value, Mapping):
        return {name: kebab(item) for name, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {name: kebab(getattr(value, attribute)) for attribute, name in _names(type(value))}
    return value


@cache
def _names(kind: type) -> tuple[tuple[str, str], ...]:
    names = [field.name for field in dataclasses.fields(kind)]
    return tuple((name, name.replace("_", "-")) for name in names)
