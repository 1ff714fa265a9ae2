"""``human-monitor-command``: the lines that people type at QEMU's other monitor, and ``qmp-shell -H`` sends.

Each is one of the commands for programs, or a view of one's reply; the words of QEMU 10.0 are kept.
"""

from __future__ import annotations

import shlex
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from kvmmig.errors import KvmmigError
from kvmmig.monitor.control import MachineControl
from kvmmig.qmp import Arguments, CommandTable, QMPError, Session
from kvmmig.units import DOWNTIME_LIMIT, MAX_BANDWIDTH, parse_duration, parse_size

_SYNCHRONOUS = "terminal does not allow synchronous migration, continuing detached"  # QEMU's sentence
_SWITCH = {"on": True, "off": False}


class HumanCommandArguments(Arguments, frozen=True):
    command_line: str
    cpu_index: int | UnsetType = UNSET


class _Wrong(Exception):
    """A line that a command can't take; the text says why."""


@dataclass(frozen=True)
class _HumanCommand:
    """``name`` has what else it is called behind a bar; ``values`` it must have; ``flags`` it may have."""

    name: str
    meaning: str
    do: Callable[[Execute, Sequence[str], Sequence[str]], Awaitable[str]]
    values: tuple[str, ...] = ()
    flags: str = ""

    @property
    def help(self) -> str:
        flags = [f"[-{flag}]" for flag in self.flags]
        return f"{' '.join([self.name, *flags, *self.values])} -- {self.meaning}"

    def split(self, words: Sequence[str]) -> tuple[list[str], list[str]]:
        """Its values and its flags. Raises `_Wrong`."""
        flags = [word for word in words if word.startswith("-") and len(word) > 1]
        values = [word for word in words if word not in flags]
        for flag in flags:
            if flag[1:] not in self.flags:
                raise _Wrong(f"unsupported option {flag}")
        if len(values) < len(self.values):
            raise _Wrong(f"{self.values[len(values)]} expected")
        if len(values) > len(self.values):
            raise _Wrong("extraneous characters at the end of line")
        return values, flags


#: Carries out a command for programs, and returns its reply as JSON has it.
Execute = Callable[..., Awaitable[Any]]


def _plain(command: str) -> Callable[[Execute, Sequence[str], Sequence[str]], Awaitable[str]]:
    async def do(execute: Execute, values: Sequence[str], flags: Sequence[str]) -> str:
        await execute(command)
        return ""

    return do


async def _migrate(execute: Execute, values: Sequence[str], flags: Sequence[str]) -> str:
    await execute("migrate", uri=values[0])
    return "" if "-d" in flags else _SYNCHRONOUS


async def _set_speed(execute: Execute, values: Sequence[str], flags: Sequence[str]) -> str:
    rate = parse_size(f"{values[0]}M" if values[0][-1:].isdecimal() else values[0], MAX_BANDWIDTH)
    await execute("migrate-set-parameters", **{"max-bandwidth": rate})
    return ""


async def _set_downtime(execute: Execute, values: Sequence[str], flags: Sequence[str]) -> str:
    milliseconds = round(parse_duration(values[0], bare="s") * 1000)
    if milliseconds not in DOWNTIME_LIMIT:
        raise ValueError(f"{values[0]} is out of range; use {DOWNTIME_LIMIT}")
    await execute("migrate-set-parameters", **{"downtime-limit": milliseconds})
    return ""


async def _set_parameter(execute: Execute, values: Sequence[str], flags: Sequence[str]) -> str:
    name, text = values
    known = await execute("query-migrate-parameters")
    if name not in known:
        raise ValueError(f"invalid parameter value: {name}")
    if name == "max-bandwidth":
        return await _set_speed(execute, [text], flags)
    whole = text.isascii() and text.isdecimal() and len(text) < 20
    await execute("migrate-set-parameters", **{name: int(text) if whole else text})
    return ""


async def _set_capability(execute: Execute, values: Sequence[str], flags: Sequence[str]) -> str:
    name, state = values
    if state not in _SWITCH:
        raise _Wrong("'on' or 'off' expected")
    if name not in [one["capability"] for one in await execute("query-migrate-capabilities")]:
        raise ValueError(f"invalid parameter value: {name}")
    one = {"capability": name, "state": _SWITCH[state]}
    await execute("migrate-set-capabilities", capabilities=[one])
    return ""


async def _info_status(execute: Execute, values: Sequence[str], flags: Sequence[str]) -> str:
    status = (await execute("query-status"))["status"]
    return f"VM status: {status if status in ('running', 'paused') else f'paused ({status})'}"


async def _info_version(execute: Execute, values: Sequence[str], flags: Sequence[str]) -> str:
    version = await execute("query-version")
    return "{major}.{minor}.{micro} ".format_map(version["qemu"]) + f"({version['package']})"


async def _info_name(execute: Execute, values: Sequence[str], flags: Sequence[str]) -> str:
    return str((await execute("query-name"))["name"])


async def _info_uuid(execute: Execute, values: Sequence[str], flags: Sequence[str]) -> str:
    return str((await execute("query-uuid"))["UUID"])


# The figures of "info migrate": how each is called there, and in what it is counted.
_TIMES = (
    ("total-time", "total time"),
    ("expected-downtime", "expected downtime"),
    ("downtime", "downtime"),
    ("setup-time", "setup"),
)
_RAM = (
    ("transferred", "transferred ram", "kbytes"),
    ("mbps", "throughput", "mbps"),
    ("remaining", "remaining ram", "kbytes"),
    ("total", "total ram", "kbytes"),
    ("duplicate", "duplicate", "pages"),
    ("normal", "normal", "pages"),
    ("normal-bytes", "normal bytes", "kbytes"),
    ("dirty-sync-count", "dirty sync count", ""),
    ("page-size", "page size", "kbytes"),
    ("multifd-bytes", "multifd bytes", "kbytes"),
    ("pages-per-second", "pages-per-second", ""),
    ("dirty-pages-rate", "dirty pages rate", "pages"),
    ("precopy-bytes", "precopy ram", "kbytes"),
    ("downtime-bytes", "downtime ram", "kbytes"),
)
_NOT_ZERO = ("dirty-pages-rate", "precopy-bytes", "downtime-bytes")  # left out where there were none


async def _info_migrate(execute: Execute, values: Sequence[str], flags: Sequence[str]) -> str:
    info = await execute("query-migrate")
    if "status" not in info:
        return ""
    why = f" ({info['error-desc']})" if info["status"] == "failed" and "error-desc" in info else ""
    lines = [f"Migration status: {info['status']}{why}"]
    lines += [f"{name}: {info[key]} ms" for key, name in _TIMES if key in info]
    ram = info.get("ram", {})
    for key, name, unit in _RAM:
        if key in ram and (ram[key] or key not in _NOT_ZERO):
            value = ram[key] >> 10 if unit == "kbytes" else ram[key]
            lines.append(
                f"{name}: {value:.2f} {unit}" if unit == "mbps" else f"{name}: {value} {unit}".rstrip()
            )
    if "cpu-throttle-percentage" in info:
        lines.append(f"cpu throttle percentage: {info['cpu-throttle-percentage']}")
    return "\n".join(lines)


_COMMANDS = (
    _HumanCommand("cont|c", "resume emulation", _plain("cont")),
    _HumanCommand("migrate", "migrate to URI; it is never waited for", _migrate, ("string",), "d"),
    _HumanCommand("migrate_cancel", "cancel the current VM migration", _plain("migrate_cancel")),
    _HumanCommand("migrate_set_capability", "switch a capability", _set_capability, ("string", "state")),
    _HumanCommand("migrate_set_downtime", "set the downtime limit, in seconds", _set_downtime, ("value",)),
    _HumanCommand("migrate_set_parameter", "set a parameter", _set_parameter, ("string", "value")),
    _HumanCommand("migrate_set_speed", "set the bandwidth, in MiB a second", _set_speed, ("value",)),
    _HumanCommand("quit|q", "quit the emulator", _plain("quit")),
    _HumanCommand("stop|s", "stop emulation", _plain("stop")),
    _HumanCommand("system_powerdown", "send system power down event", _plain("system_powerdown")),
    _HumanCommand("system_reset", "reset the system", _plain("system_reset")),
)
_VIEWS = (
    _HumanCommand("migrate", "show migration status", _info_migrate),
    _HumanCommand("name", "show the current VM name", _info_name),
    _HumanCommand("status", "show the current VM status (running|paused)", _info_status),
    _HumanCommand("uuid", "show the current VM UUID", _info_uuid),
    _HumanCommand("version", "show the version", _info_version),
)


def add_human_commands(table: CommandTable, control: MachineControl) -> None:
    """Add ``human-monitor-command`` to the table."""

    @table.command("human-monitor-command", HumanCommandArguments)
    async def human_monitor_command(session: Session, arguments: HumanCommandArguments) -> object:
        async def execute(command: str, **given: object) -> Any:
            reply = await table.execute(session, command, msgspec.json.encode(given))
            return msgspec.to_builtins(reply)

        if arguments.cpu_index is not UNSET:
            await control.settled()
            cpus = control.machine.config.cpus if control.machine is not None else 0
            if arguments.cpu_index not in range(cpus):
                raise QMPError("Parameter 'cpu-index' expects a CPU number")
        said = await _carry_out(execute, arguments.command_line)
        return "".join(f"{line}\r\n" for line in said.split("\n")) if said else ""


async def _carry_out(execute: Execute, line: str) -> str:
    try:
        words = shlex.split(line)
    except ValueError:
        return "unterminated string literal"
    if not words or words == ["help"] or words == ["info"]:
        views = [f"info {view.help}" for view in _VIEWS]
        return "\n".join([command.help for command in _COMMANDS if words == ["help"]] + views * bool(words))
    if words[0] == "help":
        found = _find(words[1:])
        return found[0].help if found else _unknown(words[1:])
    found = _find(words)
    if found is None:
        return _unknown(words)
    command, rest = found
    try:
        return await command.do(execute, *command.split(rest))
    except _Wrong as error:
        return f'{command.name}: {error}\nTry "help {command.name.partition("|")[0]}" for more information'
    except (KvmmigError, ValueError) as error:
        return f"Error: {error}"


def _find(words: Sequence[str]) -> tuple[_HumanCommand, Sequence[str]] | None:
    """The command, and the words behind it."""
    commands, at = (_VIEWS, 1) if words[0] == "info" else (_COMMANDS, 0)
    for command in commands:
        if len(words) > at and words[at] in command.name.split("|"):
            return command, words[at + 1 :]
    return None


def _unknown(words: Sequence[str]) -> str:
    return f"unknown command: '{' '.join(words)}'"
