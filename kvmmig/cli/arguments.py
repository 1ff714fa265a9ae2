"""The kinds of arguments that several commands take, and the names of machines as a shell completes them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import click
from click.shell_completion import CompletionItem

from kvmmig.units import CPUS, DURATION, MEMORY, parse_count, parse_duration, parse_size


class Memory(click.ParamType[int]):
    """Bytes of a machine's memory: 64MiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return value if isinstance(value, int) else parse_size(value, MEMORY)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Cpus(click.ParamType[int]):
    """How many vCPUs."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return value if isinstance(value, int) else parse_count(value, CPUS)
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


class Setting(click.ParamType[tuple[str, str]]):
    """A toy guest's parameter: hot=64MiB."""

    name = "name=value"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, str]:
        name, sign, setting = value.partition("=")
        if not (name and sign and setting):
            self.fail(f"{value!r} is not a setting; write it like hot=64MiB", param, ctx)
        return name, setting


class RecordPath(click.Path):
    """A file to record a migration to; an absolute path."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from kvmmig.cli.settings import record_path

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
            return [CompletionItem(name) for name in names() if name.startswith(incomplete)]
        return []


class StoringScheme(click.ParamType[str]):
    """The scheme of a transport that stores: file."""

    name = "scheme"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        from kvmmig.cli.storing import storing_schemes

        return [CompletionItem(scheme) for scheme in storing_schemes() if scheme.startswith(incomplete)]


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


class GuestOrFile(click.Path):
    """A toy guest's name, or a file; a shell completes both."""

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        from importlib.resources import files

        guests = [
            guest.name.removesuffix(".asm")
            for guest in files("kvmmig.guests").iterdir()
            if guest.name.endswith(".asm") and guest.name.startswith(incomplete)
        ]
        return [CompletionItem(name) for name in sorted(guests)] + super().shell_complete(
            ctx, param, incomplete
        )


def examples(*lines: str, more: str = "") -> str:
    """The epilog of a command's help: ``more``, if there is any, and the examples."""
    title = "Example" if len(lines) == 1 else "Examples"
    shown = "\n".join(f"  {line}" for line in lines)
    return f"{more}\n\n\b\n{title}:\n{shown}\n"


machine_argument: Callable[[Any], Any] = click.argument("name", type=MachineName())
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
