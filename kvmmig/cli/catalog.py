"""``kvmmig guests``, ``transports`` and ``version``: what there is to choose from, and what this is."""

from __future__ import annotations

import os
import platform
from typing import Any

from rich.text import Text

from kvmmig import __version__
from kvmmig.cli.columns import Column, fitted
from kvmmig.cli.printing import console_for_tables, echo, echo_json, words
from kvmmig.cli.statuses import command_line
from kvmmig.errors import KvmmigError
from kvmmig.guests import Parameter, available, find
from kvmmig.transport import Transport, Wrapper
from kvmmig.transport.registry import Registration, registrations, wrapper_registrations

#: Columns of a terminal below which a description stands under its name, and not beside it.
_NARROW = 60


def list_guests(*, as_json: bool) -> None:
    """A row for each toy guest, with its parameters and their defaults."""
    guests = available()
    if as_json:
        parameters = ("name", "default", "help")
        echo_json(
            [
                {
                    "name": guest.name,
                    "summary": guest.summary,
                    "entry": guest.entry,
                    "parameters": [
                        {key: getattr(each, key) for key in parameters} for each in guest.parameters
                    ],
                }
                for guest in guests
            ],
            indent=True,
        )
        return
    rows = []
    for guest in guests:
        lines = [guest.summary, *(f"{each}  {_help(each)}" for each in guest.parameters)]
        rows.append((guest.name, "\n".join(lines)))
    _print("GUEST", "WHAT IT DOES, AND ITS PARAMETERS (--set NAME=VALUE)", rows)


def _help(parameter: Parameter) -> str:
    return f"{parameter.help} ({', '.join(parameter.choices)})" if parameter.choices else parameter.help


def print_guest(name: str) -> None:
    """The source of one guest, as it is. Raises `WrongCommandLine` for a name that nobody has."""
    with command_line():
        source = find(name).source
    echo(source, nl=False)


def list_transports(*, as_json: bool) -> None:
    """A row for each transport, and one for each wrapper; one that can't be loaded says why."""
    transports = [_described(each, "") for each in registrations()]
    wrappers = [_described(each, f"{each.scheme}.") for each in wrapper_registrations()]
    if as_json:
        echo_json({"transports": transports, "wrappers": wrappers}, indent=True)
        return
    _print("TRANSPORT", "HOW ITS URI IS WRITTEN, AND WHAT IT IS", [_row(each) for each in transports])
    _print("WRAPPER", "HOW IT STANDS BEFORE A TRANSPORT, AND WHAT IT DOES", [_row(each) for each in wrappers])


def print_version(*, as_json: bool) -> None:
    """This kvmmig's version, and those of what it runs on."""
    versions = {
        "kvmmig": __version__,
        "python": platform.python_version(),
        "kernel": os.uname().release,
    }
    if as_json:
        echo_json(versions, indent=True)
    else:
        echo(f"kvmmig {__version__} (Python {versions['python']}, Linux {versions['kernel']})")


def _described(registration: Registration[Transport] | Registration[Wrapper], prefix: str) -> dict[str, Any]:
    about: dict[str, Any] = {"name": registration.scheme, "origin": registration.origin}
    try:
        transport = registration.load()
    except (KvmmigError, ImportError, AttributeError) as error:
        return {**about, "error": str(error)}
    options = [
        {
            "name": f"{prefix}{option.name}.file" if option.secret else f"{prefix}{option.name}",
            "help": option.help,
            "default": option.default,
            "choices": list(option.choices),
        }
        for option in transport.options
    ]
    return {**about, "syntax": transport.syntax, "summary": transport.summary, "options": options}


def _row(about: dict[str, Any]) -> tuple[str, str]:
    if "error" in about:
        return about["name"], f"it can't be used: {about['error']}\n({about['origin']})"
    lines = [about["syntax"], f"{about['summary']} ({about['origin']})"]
    for option in about["options"]:
        choices = f", {' or '.join(option['choices'])}" if option["choices"] else ""
        default = f" (default {option['default']})" if option["default"] else ""
        lines.append(f"{option['name']}: {option['help']}{choices}{default}")
    return about["name"], "\n".join(lines)


def _print(title: str, description: str, rows: list[tuple[str, str]]) -> None:
    out = console_for_tables()
    if out.width >= _NARROW:
        out.print(fitted((Column(title), Column(description, folds=True)), rows, out, spaced=True))
        return
    for name, text in rows:
        out.print(words(name, "bold"))
        out.print(Text.assemble(words(text), "\n"))
