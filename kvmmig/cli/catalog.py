"""``kvmmig guests`` and ``kvmmig transports``: what there is to choose from."""

from __future__ import annotations

from rich.table import Table

from kvmmig.cli.printing import console, echo, words
from kvmmig.errors import KvmmigError
from kvmmig.guests import Parameter, available, find
from kvmmig.transport import Transport, Wrapper
from kvmmig.transport.registry import Registration, registrations, wrapper_registrations


def list_guests() -> None:
    """A row for each toy guest, with its parameters and their defaults."""
    table = _table("guest", "what it does", "parameters (--set name=value)")
    for guest in available():
        parameters = "\n".join(f"{parameter}  {_help(parameter)}" for parameter in guest.parameters)
        table.add_row(guest.name, words(guest.summary), words(parameters))
    console().print(table)


def _help(parameter: Parameter) -> str:
    return f"{parameter.help} ({', '.join(parameter.choices)})" if parameter.choices else parameter.help


def print_guest(name: str) -> None:
    """The source of one guest, as it is. Raises `BadImage` for a name that nobody has."""
    echo(find(name).source, nl=False)


def list_transports() -> None:
    """A row for each transport, and one for each wrapper; one that can't be loaded says why."""
    out = console()
    table = _table("transport", "how its URI is written, and what it is")
    for transport in registrations():
        table.add_row(words(transport.scheme), words("\n".join(_describe(transport, ""))))
    out.print(table)
    table = _table("wrapper", "how it stands before a transport, and what it does")
    for wrapper in wrapper_registrations():
        table.add_row(words(wrapper.scheme), words("\n".join(_describe(wrapper, f"{wrapper.scheme}."))))
    out.print(table)


def _describe(registration: Registration[Transport] | Registration[Wrapper], prefix: str) -> list[str]:
    try:
        transport = registration.load()
    except (KvmmigError, ImportError, AttributeError) as error:
        return [f"it can't be used: {error}", f"({registration.origin})"]
    lines = [transport.syntax, f"{transport.summary} ({registration.origin})"]
    for option in transport.options:
        choices = f", {' or '.join(option.choices)}" if option.choices else ""
        default = f" (default {option.default})" if option.default else ""
        name = f"{option.name}.file" if option.secret else option.name
        lines.append(f"{prefix}{name}: {option.help}{choices}{default}")
    return lines


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 1, 0))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
