"""``kvmmig set``: what holds for migrations, in the units that people write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import click

from kvmmig.cli.columns import Column, fitted
from kvmmig.cli.lifetime import run_to_end
from kvmmig.cli.printing import console_for_tables, echo_json
from kvmmig.cli.remote import machine
from kvmmig.cli.setting_table import BY_ANY_NAME, ON_OR_OFF, POLICY, SETTINGS, SWITCHES, Setting
from kvmmig.qmp.client import QMPClient


def change(name: str, pairs: Sequence[tuple[str, str]]) -> int:
    """Change settings of one machine; returns 0.

    Raises `click.UsageError` for what makes no sense, changing nothing, and `KvmmigError`: some may have
    changed by then.
    """
    commands = commands_for(pairs)

    async def execute() -> int:
        async with machine(name) as client:
            for command, arguments in commands:
                await client.execute(command, arguments)
        return 0

    return run_to_end(execute)


def commands_for(pairs: Sequence[tuple[str, str]]) -> list[tuple[str, Mapping[str, object]]]:
    """The monitor's commands that set them. Raises `click.UsageError` for what makes no sense."""
    parameters: dict[str, object] = {}
    commands: list[tuple[str, Mapping[str, object]]] = []
    for setting, value in pairs:
        if setting in BY_ANY_NAME:
            parameters[BY_ANY_NAME[setting].parameter] = _parse(BY_ANY_NAME[setting], value)
        elif setting in SWITCHES:
            if value not in ON_OR_OFF:
                raise click.UsageError(f"{setting} {value}: it is on or off")
            capability = {"capability": SWITCHES[setting], "state": ON_OR_OFF[value]}
            commands.append(("migrate-set-capabilities", {"capabilities": [capability]}))
        elif setting == POLICY:
            commands.append(("x-kvmmig-set-policy", {"policy": value}))
        elif "." in setting:
            commands.append(("x-kvmmig-set-knob", {"name": setting, "value": value}))
        else:
            known = ", ".join((*SETTINGS, *SWITCHES, POLICY))
            raise click.UsageError(
                f"there is no setting {setting!r}; there are {known}, and a migration's own, such as "
                "throttle.rate, while it runs"
            )
    if parameters:
        commands.insert(0, ("migrate-set-parameters", parameters))
    return commands


def show(name: str, *, as_json: bool) -> int:
    """List the settings of one machine; returns 0. Raises `KvmmigError`."""

    async def ask() -> int:
        async with machine(name) as client:
            rows = await _rows(client)
        if as_json:
            echo_json({setting: value for setting, value, _ in rows}, indent=True)
            return 0
        out = console_for_tables()
        columns = (Column("SETTING"), Column("VALUE"), Column("WRITTEN", importance=1, folds=True))
        out.print(fitted(columns, rows, out))
        return 0

    return run_to_end(ask)


async def _rows(client: QMPClient) -> list[tuple[str, str, str]]:
    parameters = await client.execute("query-migrate-parameters")
    rows = [
        (setting.name, setting.write(parameters[setting.parameter]), f"such as {setting.example}")
        for setting in SETTINGS.values()
    ]
    capabilities = await client.execute("query-migrate-capabilities")
    switches = {each["capability"]: "on" if each["state"] else "off" for each in capabilities}
    rows += [(name, switches[capability], "on or off") for name, capability in SWITCHES.items()]
    policies = await client.execute("x-kvmmig-query-policies")
    active = next(each["policy"] for each in policies if each["active"])
    rows.append((POLICY, active, "one of " + ", ".join(each["policy"] for each in policies)))
    knobs = await client.execute("x-kvmmig-query-knobs")
    rows += [(knob["name"], knob["value"], "of the migration that runs") for knob in knobs]
    return rows


def _parse(setting: Setting, value: str) -> object:
    try:
        return setting.parse(value)
    except ValueError as error:
        raise click.UsageError(f"{setting.name}: {error}") from error
