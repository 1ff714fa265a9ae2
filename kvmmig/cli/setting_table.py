"""What ``kvmmig set`` can set: each setting's name, QEMU's name of it, and how it is written."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kvmmig.units import (
    DOWNTIME_LIMIT,
    SETUP_TIMEOUT,
    STALL_TIMEOUT,
    TIMEOUT,
    Range,
    parse_milliseconds,
    parse_percent,
    parse_rate,
    write_duration,
    write_rate,
)

NONE = "none"
POLICY = "policy"


def record_path(text: str) -> str:
    """A file to record to, as a path that means the same to a machine's process. `ValueError` for none."""
    path = os.path.abspath(text)
    if "\0" in text or not text:
        raise ValueError(f"{text!r} is no path")
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{text!r} is no UTF-8, and a monitor takes no other text") from error
    return path


@dataclass(frozen=True)
class Setting:
    """One setting: ``parameter`` is QEMU's name of it; ``write`` writes a value as ``parse`` reads it."""

    name: str
    parameter: str
    example: str
    parse: Callable[[str], object]
    write: Callable[[Any], str]
    choices: tuple[str, ...] = ()


def _or_none(parse: Callable[[str], int]) -> Callable[[str], int]:
    def parse_or_none(text: str) -> int:
        try:
            return 0 if text == NONE else parse(text)
        except ValueError as error:
            raise ValueError(f"{error}; {NONE} is no limit") from error

    return parse_or_none


def _milliseconds(within: Range) -> Callable[[str], int]:
    return lambda text: parse_milliseconds(text, within)


def _write_milliseconds(value: int) -> str:
    return write_duration(value / 1000)


def _one_of(choices: tuple[str, ...]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(f"{text!a} is not one of {', '.join(choices)}")
        return text

    return parse


def _on_or_off(text: str) -> bool:
    return _one_of(_ON_OR_OFF)(text) == "on"


def _write_on_or_off(value: bool) -> str:
    return "on" if value else "off"


_AT_TIMEOUT = ("cancel", "force")
_ON_OR_OFF = ("on", "off")
_ALL = (
    Setting("downtime-limit", "downtime-limit", "50ms", _milliseconds(DOWNTIME_LIMIT), _write_milliseconds),
    Setting(
        "bandwidth",
        "max-bandwidth",
        "500MB/s, or none",
        _or_none(parse_rate),
        lambda value: write_rate(value) if value else NONE,
        (NONE,),
    ),
    Setting("throttle-initial", "cpu-throttle-initial", "20%", parse_percent, "{}%".format),
    Setting("throttle-increment", "cpu-throttle-increment", "10%", parse_percent, "{}%".format),
    Setting("throttle-max", "max-cpu-throttle", "99%", parse_percent, "{}%".format),
    Setting(
        "timeout",
        "x-kvmmig-timeout",
        "2min, or none",
        _or_none(_milliseconds(TIMEOUT)),
        lambda value: _write_milliseconds(value) if value else NONE,
        (NONE,),
    ),
    Setting("on-timeout", "x-kvmmig-on-timeout", "cancel, or force", _one_of(_AT_TIMEOUT), str, _AT_TIMEOUT),
    Setting(
        "stall-timeout", "x-kvmmig-stall-timeout", "30s", _milliseconds(STALL_TIMEOUT), _write_milliseconds
    ),
    Setting(
        "setup-timeout", "x-kvmmig-setup-timeout", "1min", _milliseconds(SETUP_TIMEOUT), _write_milliseconds
    ),
    Setting(
        "record",
        "x-kvmmig-record",
        "a.jsonl, or none",
        lambda text: "" if text == NONE else record_path(text),
        lambda value: value or NONE,
        (NONE,),
    ),
    Setting("page-digests", "x-kvmmig-page-digests", "on, or off", _on_or_off, _write_on_or_off, _ON_OR_OFF),
)
SETTINGS: Mapping[str, Setting] = {setting.name: setting for setting in _ALL}
#: The same, found by QEMU's names too.
BY_ANY_NAME = {name: setting for setting in _ALL for name in (setting.name, setting.parameter)}
#: Settings that are on or off, and their capabilities.
SWITCHES: Mapping[str, str] = {"auto-converge": "auto-converge"}
ON_OR_OFF: Mapping[str, bool] = {"on": True, "off": False}
