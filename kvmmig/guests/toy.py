"""Toy guests: one assembler file each, which declares in its first lines what it is called and what it takes.

::

    # dirtier: fills its memory, rewrites a hot set for ever, and checks every page as it goes
    #@ entry long64
    #@ param hot = 64MiB    bytes that are rewritten over and over, shared by all vCPUs
    #@ check dirtier

A parameter is a number with or without a unit, and a constant of its upper-case name in the source; MEMORY
(bytes of RAM) and CPUS are constants too. So a copy that somebody has changed works just as a built-in does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Literal, Protocol

from kvmmig.errors import BadConfig, BadImage
from kvmmig.guests import dirtier
from kvmmig.guests.assembler import assemble
from kvmmig.guests.check import Check
from kvmmig.machine import Machine
from kvmmig.machine.boot import LONG_START, REAL_START, Entry, Program
from kvmmig.machine.memory import GuestMemory
from kvmmig.units import PARAMETER, parse_size

_TITLE = re.compile(r"#\s*([A-Za-z0-9][\w.-]*):\s*(\S.*)")
_PARAMETER = re.compile(r"([a-z][a-z0-9_]*)\s*=\s*(\S+)\s*(.*)")
_PREDEFINED = ("memory", "cpus")

_Mode = tuple[Literal[16, 64], int]
_MODES: Mapping[Entry, _Mode] = {Entry.REAL16: (16, REAL_START), Entry.LONG64: (64, LONG_START)}


class HostCheck(Protocol):
    """What the host knows of one kind of guest; a module of this package."""

    def validate(self, *, memory: int, cpus: int, parameters: Mapping[str, int]) -> None:
        """Raise `BadConfig` for parameters that make no sense together."""

    def check(self, memory: GuestMemory, *, cpus: int, parameters: Mapping[str, int]) -> Check:
        """Check a stopped guest's memory. Blocking."""


_CHECKS: Mapping[str, HostCheck] = {"dirtier": dirtier}


@dataclass(frozen=True, slots=True)
class Parameter:
    """Something that can be set when a toy guest is assembled. ``default`` is as its source has it: 64MiB."""

    name: str
    default: str
    help: str


@dataclass(frozen=True, slots=True)
class ToyGuest:
    """One .asm file and what its header says."""

    name: str
    summary: str
    entry: Entry
    parameters: tuple[Parameter, ...]
    check: str | None  # the host's check that knows this guest's memory
    source: str
    path: str  # for errors

    @classmethod
    def parse(cls, source: str, path: str) -> ToyGuest:
        """Read the header of a source. Raises `BadImage` that names ``path`` and the line."""
        lines = source.splitlines()
        title = _TITLE.fullmatch(lines[0].strip()) if lines else None
        if title is None:
            raise BadImage(f"{path}:1: a guest begins with its name and what it does: # hello: prints a line")
        entry: Entry | None = None
        check: str | None = None
        parameters: dict[str, Parameter] = {}
        for number, line in enumerate(lines, 1):
            if not line.startswith("#@"):
                continue
            word, _, rest = line[2:].strip().partition(" ")
            rest = rest.strip()
            complaint = ""
            if word == "entry":
                complaint = "" if rest in _MODES else f"write {' or '.join(f'#@ entry {m}' for m in _MODES)}"
                entry = Entry(rest) if not complaint else None
            elif word == "check":
                complaint = "" if rest in _CHECKS else f"the host can check {', '.join(_CHECKS)}"
                check = rest
            elif word == "param":
                complaint = _add_parameter(parameters, rest)
            else:
                complaint = "after #@ comes entry, param or check"
            if complaint:
                raise BadImage(f"{path}:{number}: {complaint}: {line}")
        if entry is None:
            raise BadImage(f"{path}: it does not say how it starts; write #@ entry long64 (or real16)")
        return cls(title[1], title[2], entry, tuple(parameters.values()), check, source, path)

    def program(self, *, memory: int, cpus: int, settings: Mapping[str, int | str]) -> Program:
        """Assemble it for a machine with ``memory`` bytes and ``cpus`` vCPUs.

        ``settings`` replaces defaults; `Program.parameters` has all of them, as numbers. The program bears
        the name of its check if it has one: that name travels with the machine, to where no source is.

        Raises `BadConfig` for a setting that makes no sense, `BadImage` for a source that can't be assembled.
        """
        known = {parameter.name for parameter in self.parameters}
        for name in settings:
            if name not in known:
                right = f"it has {', '.join(sorted(known))}" if known else "it has none"
                raise BadConfig(f"{self.name} has no parameter {name!r}; {right}")
        values = {p.name: self._number(p.name, settings.get(p.name, p.default)) for p in self.parameters}
        if self.check is not None:
            _CHECKS[self.check].validate(memory=memory, cpus=cpus, parameters=values)
        constants = {"MEMORY": memory, "CPUS": cpus} | {name.upper(): value for name, value in values.items()}
        bits, origin = _MODES[self.entry]
        image = assemble(self.source, bits=bits, origin=origin, constants=constants, name=self.path)
        if not image:
            raise BadImage(f"{self.path}: there is no instruction in it")
        return Program(self.check or self.name, self.entry, image, values)

    def _number(self, name: str, value: int | str) -> int:
        try:
            if isinstance(value, str):
                return parse_size(value, PARAMETER)
            return PARAMETER.check_whole(value, "it")
        except ValueError as error:
            raise BadConfig(f"{self.name}: {name}: {error}") from error


def available() -> tuple[ToyGuest, ...]:
    """The built-in guests, by name."""
    return _built_in()


def find(name: str) -> ToyGuest:
    """A built-in guest by its name, or any other by the path of its .asm file. Raises `BadImage`."""
    for guest in _built_in():
        if guest.name == name:
            return guest
    path = Path(name)
    if path.suffix != ".asm" and not path.is_file():
        names = ", ".join(guest.name for guest in _built_in())
        raise BadImage(f"there is no guest {name!r}; use {names}, or the path of an .asm file")
    try:
        return ToyGuest.parse(path.read_text(encoding="utf-8"), name)
    except OSError as error:
        raise BadImage(f"{name}: it can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise BadImage(f"{name}: this is no assembler source: it is not text") from error


def check(name: str, memory: GuestMemory, *, cpus: int, parameters: Mapping[str, int]) -> Check | None:
    """Check the memory of a stopped guest from outside. None for a guest that no host check knows.

    ``name`` and ``parameters`` are those of its `Program`, which a migration carries along. Blocking: a
    second or so per GiB, so call it in a thread. Raises `BadConfig` for parameters that the guest can't have.
    """
    host_check = _CHECKS.get(name)
    return host_check.check(memory, cpus=cpus, parameters=parameters) if host_check else None


def check_machine(machine: Machine) -> Check | None:
    """`check` the guest of a machine, which must be paused or have ended. Blocking, as that is."""
    described = machine.description
    return check(described.name, machine.memory, cpus=described.cpus, parameters=described.parameters)


def _add_parameter(parameters: dict[str, Parameter], text: str) -> str:
    """Take one parameter's declaration, or say what is wrong with it."""
    match = _PARAMETER.fullmatch(text)
    if match is None:
        return "write #@ param name = default  what it is, the name in lower case"
    name, default, help_ = match.groups()
    if name in parameters or name in _PREDEFINED:
        return f"{name} is there already"
    try:
        parse_size(default)
    except ValueError as error:
        return str(error)
    parameters[name] = Parameter(name, default, help_)
    return ""


@cache
def _built_in() -> tuple[ToyGuest, ...]:
    files = (file for file in resources.files(__package__).iterdir() if file.name.endswith(".asm"))
    guests = (ToyGuest.parse(file.read_text(encoding="utf-8"), file.name) for file in files)
    return tuple(sorted(guests, key=lambda guest: guest.name))
