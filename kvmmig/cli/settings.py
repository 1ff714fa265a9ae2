"""``kvmmig set``: what holds for migrations, in the units that people write."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import click

from kvmmig.cli.lifetime import run_to_end
from kvmmig.cli.printing import echo
from kvmmig.cli.remote import machine
from kvmmig.qmp.client import QMPClient
from kvmmig.units import (
    DOWNTIME_LIMIT,
    SETUP_TIMEOUT,
    STALL_TIMEOUT,
    TIMEOUT,
    Range,
    format_duration,
    format_rate,
    parse_milliseconds,
    parse_percent,
    parse_rate,
)

_NONE = "none"


@dataclass(frozen=True)
class _Setting:
    """One setting: ``parameter`` is QEMU's name of it, and how it is parsed and shown."""

    name: str
    parameter: str
    example: str
    parse: Callable[[str], object]
    show: Callable[[Any], str]


def _or_none(parse: Callable[[str], int]) -> Callable[[str], int]:
    def parse_or_none(text: str) -> int:
        try:
            return 0 if text == _NONE else parse(text)
        except ValueError as error:
            raise ValueError(f"{error}; {_NONE} is no limit") from error

    return parse_or_none


def _milliseconds(within: Range) -> Callable[[str], int]:
    return lambda text: parse_milliseconds(text, within)


def _show_milliseconds(value: int) -> str:
    return format_duration(value / 1000)


_SETTINGS = (
    _Setting("downtime-limit", "downtime-limit", "50ms", _milliseconds(DOWNTIME_LIMIT), _show_milliseconds),
    _Setting(
        "bandwidth",
        "max-bandwidth",
        "500MB/s, or none",
        _or_none(parse_rate),
        lambda value: format_rate(value) if value else _NONE,
    ),
    _Setting("throttle-initial", "cpu-throttle-initial", "20%", parse_percent, "{} %".format),
    _Setting("throttle-increment", "cpu-throttle-increment", "10%", parse_percent, "{} %".format),
    _Setting("throttle-max", "max-cpu-throttle", "99%", parse_percent, "{} %".format),
    _Setting(
        "timeout",
        "x-kvmmig-timeout",
        "2min, or none",
        _or_none(_milliseconds(TIMEOUT)),
        lambda value: _show_milliseconds(value) if value else _NONE,
    ),
    _Setting("on-timeout", "x-kvmmig-on-timeout", "cancel, or force", str, str),
    _Setting(
        "stall-timeout", "x-kvmmig-stall-timeout", "30s", _milliseconds(STALL_TIMEOUT), _show_milliseconds
    ),
    _Setting(
        "setup-timeout", "x-kvmmig-setup-timeout", "1min", _milliseconds(SETUP_TIMEOUT), _show_milliseconds
    ),
    _Setting(
        "record",
        "x-kvmmig-record",
        "a.jsonl, or none",
        lambda text: "" if text == _NONE else record_path(text),
        lambda value: value or _NONE,
    ),
)
_BY_NAME = {name: setting for setting in _SETTINGS for name in (setting.name, setting.parameter)}
_POLICY = "policy"
#: Settings that are on or off, and their capabilities.
_SWITCHES = {"auto-converge": "auto-converge", "page-digests": "x-kvmmig-page-digests"}
_SWITCH = {"on": True, "off": False}


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


def change(name: str, pairs: Sequence[tuple[str, str]]) -> int:
    """Change settings of one machine; returns 0.

    Raises `click.UsageError` for what makes no sense, changing nothing, and `KvmmigError`: some may have
    changed by then.
    """
    parameters: dict[str, object] = {}
    commands: list[tuple[str, dict[str, object]]] = []
    for setting, value in pairs:
        if setting in _BY_NAME:
            parameters[_BY_NAME[setting].parameter] = _parse(_BY_NAME[setting], value)
        elif setting in _SWITCHES:
            if value not in _SWITCH:
                raise click.UsageError(f"{setting} {value}: it is on or off")
            capability = {"capability": _SWITCHES[setting], "state": _SWITCH[value]}
            commands.append(("migrate-set-capabilities", {"capabilities": [capability]}))
        elif setting == _POLICY:
            commands.append(("x-kvmmig-set-policy", {"policy": value}))
        elif "." in setting:
            commands.append(("x-kvmmig-set-knob", {"name": setting, "value": value}))
        else:
            known = ", ".join((*(each.name for each in _SETTINGS), *_SWITCHES, _POLICY))
            raise click.UsageError(
                f"there is no setting {setting!r}; there are {known}, and a migration's own, such as "
                "throttle.rate, while it runs"
            )
    if parameters:
        commands.insert(0, ("migrate-set-parameters", parameters))

    async def execute() -> int:
        async with machine(name) as client:
            for command, arguments in commands:
                await client.execute(command, arguments)
        return 0

    return run_to_end(execute)


def show(name: str) -> int:
    """List the settings of one machine; returns 0. Raises `KvmmigError`."""

    async def ask() -> int:
        async with machine(name) as client:
            for row in await _rows(client):
                echo("{:<20} {:<12} {}".format(*row).rstrip())
        return 0

    return run_to_end(ask)


async def _rows(client: QMPClient) -> list[tuple[str, str, str]]:
    parameters = await client.execute("query-migrate-parameters")
    rows = [
        (setting.name, setting.show(parameters[setting.parameter]), f"such as {setting.example}")
        for setting in _SETTINGS
    ]
    capabilities = await client.execute("query-migrate-capabilities")
    switches = {each["capability"]: "on" if each["state"] else "off" for each in capabilities}
    rows += [(name, switches[capability], "on or off") for name, capability in _SWITCHES.items()]
    policies = await client.execute("x-kvmmig-query-policies")
    active = next(each["policy"] for each in policies if each["active"])
    rows.append((_POLICY, active, "one of " + ", ".join(each["policy"] for each in policies)))
    knobs = await client.execute("x-kvmmig-query-knobs")
    rows += [(knob["name"], knob["value"], "of the migration that runs") for knob in knobs]
    return rows


def _parse(setting: _Setting, value: str) -> object:
    try:
        return setting.parse(value)
    except ValueError as error:
        raise click.UsageError(f"{setting.name}: {error}") from error
