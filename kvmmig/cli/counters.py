"""What a channel counts itself, in the units that people read."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from kvmmig.units import format_duration, format_rate, format_size

#: By the last word of a counter's name, which is its unit.
_UNITS: Mapping[str, Callable[[float], str]] = {
    "bytes": format_size,
    "seconds": format_duration,
    "rate": format_rate,
}


def counter_rows(counters: Mapping[str, float | None]) -> list[tuple[str, str]]:
    """Each counter's name and its value as text. A figure that JSON has no number for came as None."""
    return [(name, _text(name, value)) for name, value in counters.items()]


def _text(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    unit = re.split(r"[.-]", name)[-1]
    return _UNITS[unit](value) if unit in _UNITS else f"{value:.12g}"
