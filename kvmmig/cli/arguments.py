"""The kinds of arguments that several commands take, and the names of machines as a shell completes them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import click
from click.shell_completion import CompletionItem

from kvmmig.cli.completion import matching
from kvmmig.units import (
    DURATION,
    MEMORY,
    MEMORY_UNIT,
    Range,
    parse_count,
    parse_duration,
    parse_size,
    write_size,
)


class Memory(click.ParamType[int]):
    """Bytes of a machine's memory: 64MiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return value if isinstance(value, int) else _memory(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


def _memory(text: str) -> int:
    size = parse_size(text, MEMORY)
    if size % MEMORY_UNIT:
        decimal = text.strip().upper().endswith("B")
        meant = (
            f"{text.strip()[:-1].upper()}iB"
            if decimal
            else write_size(round(size / MEMORY_UNIT) * MEMORY_UNIT)
        )
        raise ValueError(f"{text!a} is no multiple of {write_size(MEMORY_UNIT)}; did you mean {meant}?")
    return size


class Count(click.ParamType[int]):
    """A whole number, such as how many vCPUs."""

    name = "number"

    def __init__(self, within: Range) -> None:
        self._within = within

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return value if isinstance(value, int) else parse_count(value, self._within)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Seconds(click.ParamType[float]):
    """A duration: 50ms; of a bare number the metavar must say that it is seconds."""

    name = "seconds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            return value if isinstance(value, float) else parse_duration(value, DURATION, bare="s")
        except ValueError as error:
            self.fail(str(error), param, ctx)


class RecordPath(click.Path):
    """A file to record a migration to; an absolute path."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from kvmmig.cli.setting_table import record_path

        try:
            return record_path(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


class MachineName(click.ParamType[str]):
    """The name of a machine that runs."""

    name = "name"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        from kvmmig.cli.rundir import RuntimeDirectoryUnusable, names

        with suppress(RuntimeDirectoryUnusable):  # the command will say so
            return matching(names(), incomplete)
        return []


class StoringScheme(click.ParamType[str]):
    """The scheme of a transport that stores: file."""

    name = "scheme"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        from kvmmig.cli.storing import storing_schemes

        return matching(storing_schemes(), incomplete)


class StoringOption(click.Option):
    """``--transport SCHEME``; its help ends with the schemes that there are, found when it is shown."""

    def __init__(self, declarations: list[str], *, help: str) -> None:
        super().__init__(declarations, type=StoringScheme(), metavar="SCHEME", default="file", help=help)

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        from kvmmig.cli.storing import storing_schemes

        record = super().get_help_record(ctx)
        return record and (
            record[0],
            f"{record[1]}  [there are: {', '.join(storing_schemes())}; default: file]",
        )


class GuestName(click.ParamType[str]):
    """A toy guest's name."""

    name = "guest"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return str(value)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        return matching(_guests(), incomplete)


class GuestOrFile(click.Path):
    """A toy guest's name, or a file; a shell completes both."""

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        return matching(_guests(), incomplete) + super().shell_complete(ctx, param, incomplete)


def _guests() -> list[str]:
    """The toy guests' names, without importing what it takes to run them."""
    from importlib.resources import files

    names = (guest.name for guest in files("kvmmig.guests").iterdir())
    return sorted(name.removesuffix(".asm") for name in names if name.endswith(".asm"))


def examples(*lines: str, more: str = "") -> str:
    """The epilog of a command's help: ``more``, if there is any, and the examples."""
    title = "Example" if len(lines) == 1 else "Examples"
    shown = "\n".join(f"  {line}" for line in lines)
    return f"{more}\n\n\b\n{title}:\n{shown}\n"


machine_argument: Callable[[Any], Any] = click.argument("name", type=MachineName())
machines_argument: Callable[[Any], Any] = click.argument(
    "names", type=MachineName(), nargs=-1, required=True, metavar="NAME..."
)
record_option: Callable[[Any], Any] = click.option(
    "--record",
    type=RecordPath(),
    metavar="FILE",
    help='Append to FILE what happens in the migration, for "kvmmig record", "plot" and "trace".',
)
secret_file_option: Callable[[Any], Any] = click.option(
    "--secret-file",
    type=click.Path(),
    metavar="FILE",
    help="Both sides prove that they know what FILE says, before anything else: secret+ before the URI.",
)
json_option: Callable[[Any], Any] = click.option(
    "--json", "as_json", is_flag=True, help="Print JSON, for programs."
)
