"""Toy guests: one assembler file each, which declares in its first lines what it is called and what it takes.

::

    ; dirtier: fills its memory, rewrites a hot set for ever, and checks every page as it goes
    ;@ entry long64
    ;@ param hot = 64MiB|25%    bytes that are rewritten over and over, shared by all vCPUs
    ;@ param pattern = sweep|random|zipf    in which order
    ;@ check dirtier

A guest finds its parameters as 64-bit words at `PARAMETERS`, in the order in which it declares them, so one
assembled image serves any setting, and a copy that somebody has changed works just as a built-in does. A
parameter is a number with or without a unit, and the default may be the lesser of it and a share of the
memory; or it is one of several words, the first of which is the default, and the guest finds its place among
them, counted from 0. An .asm without such lines is taken as it is: from a book, say.
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
from kvmmig.machine.boot import LONG_START, MOST_PARAMETERS, REAL_START, Entry, Program
from kvmmig.machine.memory import PAGE_SIZE, GuestMemory
from kvmmig.units import PARAMETER, parse_size

_TITLE = re.compile(r";\s*([A-Za-z0-9][\w.-]*):\s*(\S.*)")
_PARAMETER = re.compile(r"([a-z][a-z0-9_]*)\s*=\s*(\S+)\s*(.*)")
_SHARE = re.compile(r"([^|]+)\|([1-9][0-9]?)%")
_CHOICES = re.compile(r"[a-z]\w*(\|[a-z]\w*)+")

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
    """Something that can be set when a toy guest is loaded. ``default`` is as its source has it: 64MiB."""

    name: str
    default: str
    help: str
    share: int | None = None  # the default is at most so many per cent of the memory
    choices: tuple[str, ...] = ()  # what it may be, where it is not a number

    def __str__(self) -> str:
        """Its name and default, as a person reads it."""
        if self.share is not None:
            return f"{self.name}={self.default}, at most {self.share}% of the memory"
        return f"{self.name}={self.default}"

    def value(self, given: int | str | None, memory: int) -> int:
        """The number that the guest gets. Raises `ValueError` with a sentence."""
        if self.choices:
            chosen = self.default if given is None else given
            if chosen not in self.choices:
                raise ValueError(f"it can't be {chosen!r}; use {', '.join(self.choices)}")
            return self.choices.index(str(chosen))
        if given is None:
            number = parse_size(self.default, PARAMETER)
            most = memory * (self.share or 100) // 100 // PAGE_SIZE * PAGE_SIZE
            return number if self.share is None else min(number, most)
        return parse_size(given, PARAMETER) if isinstance(given, str) else PARAMETER.check_whole(given, "it")


@dataclass(frozen=True, slots=True)
class ToyGuest:
    """One .asm file and what its header says."""

    name: str
    summary: str
    entry: Entry | None  # None for a source without a header: its image tells, or the user
    parameters: tuple[Parameter, ...]
    check: str | None  # the host's check that knows this guest's memory
    source: str
    path: str  # for errors, and for what the source includes
    image: bytes | None = None  # what nasm has made of it, for a built-in guest

    @classmethod
    def parse(cls, source: str, path: str, image: bytes | None = None) -> ToyGuest:
        """Read the header of a source. Raises `BadImage` that names ``path`` and the line."""
        lines = source.splitlines()
        declared = [(number, line) for number, line in enumerate(lines, 1) if line.startswith(";@")]
        title = _TITLE.fullmatch(lines[0].strip()) if lines else None
        if not declared and title is None:
            return cls(Path(path).stem, "", None, (), None, source, path, image)
        if title is None:
            raise BadImage(f"{path}:1: a guest begins with its name and what it does: ; hello: prints a line")
        entry: Entry | None = None
        check: str | None = None
        parameters: dict[str, Parameter] = {}
        for number, line in declared:
            word, _, rest = line[2:].strip().partition(" ")
            rest = rest.strip()
            complaint = ""
            if word == "entry":
                complaint = "" if rest in _MODES else f"write {' or '.join(f';@ entry {m}' for m in _MODES)}"
                entry = Entry(rest) if not complaint else None
            elif word == "check":
                complaint = "" if rest in _CHECKS else f"the host can check {', '.join(_CHECKS)}"
                check = rest
            elif word == "param":
                complaint = _add_parameter(parameters, rest)
            else:
                complaint = "after ;@ comes entry, param or check"
            if complaint:
                raise BadImage(f"{path}:{number}: {complaint}: {line}")
        if entry is None and declared:
            raise BadImage(f"{path}: it does not say how it starts; write ;@ entry long64 (or real16)")
        return cls(title[1], title[2], entry, tuple(parameters.values()), check, source, path, image)

    def program(self, *, memory: int, cpus: int, settings: Mapping[str, int | str]) -> Program:
        """What a machine with ``memory`` bytes and ``cpus`` vCPUs is to load.

        ``settings`` replaces defaults; `Program.parameters` has all of them, as numbers. The program bears
        the name of its check if it has one: that name travels with the machine, to where no source is.

        Raises `BadConfig` for a setting that makes no sense, `BadImage` for a source that can't be assembled.
        """
        known = {parameter.name for parameter in self.parameters}
        for name in settings:
            if name not in known:
                right = f"it has {', '.join(sorted(known))}" if known else "it has none"
                raise BadConfig(f"{self.name} has no parameter {name!r}; {right}")
        values = {}
        for parameter in self.parameters:
            try:
                values[parameter.name] = parameter.value(settings.get(parameter.name), memory)
            except ValueError as error:
                raise BadConfig(f"{self.name}: {parameter.name}: {error}") from error
        if self.check is not None:
            _CHECKS[self.check].validate(memory=memory, cpus=cpus, parameters=values)
        if self.entry is None:
            raise BadImage(f"{self.path}: it does not say how it starts; write ;@ entry long64 (or real16)")
        image = self.image if self.image is not None else self.assembled()
        return Program(self.check or self.name, self.entry, image, values)

    def assembled(self) -> bytes:
        """What nasm makes of the source. Raises `BadImage`, as `assemble` does."""
        folder = Path(self.path).parent
        where = folder if folder.is_dir() else None
        if self.entry is None:
            image = assemble(self.source, name=self.path, directory=where)
        else:
            bits, origin = _MODES[self.entry]
            image = assemble(self.source, name=self.path, bits=bits, origin=origin, directory=where)
        if not image:
            raise BadImage(f"{self.path}: there is no instruction in it")
        return image


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
        return "write ;@ param name = default  what it is, the name in lower case"
    name, default, help_ = match.groups()
    if name in parameters:
        return f"{name} is there already"
    if len(parameters) == MOST_PARAMETERS:
        return f"a guest has at most {MOST_PARAMETERS} parameters"
    if _CHOICES.fullmatch(default):
        choices = tuple(default.split("|"))
        parameters[name] = Parameter(name, choices[0], help_, choices=choices)
        return ""
    shared = _SHARE.fullmatch(default)
    number = shared[1] if shared else default
    try:
        parse_size(number, PARAMETER)
    except ValueError as error:
        return str(error)
    parameters[name] = Parameter(name, number, help_, share=int(shared[2]) if shared else None)
    return ""


@cache
def _built_in() -> tuple[ToyGuest, ...]:
    folder = resources.files(__package__)
    guests = [
        ToyGuest.parse(
            file.read_text(encoding="utf-8"),
            file.name,
            folder.joinpath(file.name.removesuffix(".asm") + ".bin").read_bytes(),
        )
        for file in folder.iterdir()
        if file.name.endswith(".asm")
    ]
    return tuple(sorted(guests, key=lambda guest: guest.name))
