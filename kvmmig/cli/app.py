"""The commands, as far as ``--help`` needs them. What they do is imported when they are called."""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from kvmmig.errors import KvmmigError
from kvmmig.units import parse_duration, parse_size


def run_command() -> int:
    """Run the command of ``sys.argv``. Raises nothing for bad input: that is a sentence and a status."""
    _fill_standard_descriptors()
    try:
        status: Any = cli.main(standalone_mode=False, prog_name="kvmmig")
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort:
        return 130
    except KvmmigError as error:
        click.echo(f"kvmmig: {error}", err=True)
        return 1
    except BrokenPipeError:  # "kvmmig guests | head": python would complain again when it flushes
        sys.stdout = None
        return 1
    return status if isinstance(status, int) else 0


def _fill_standard_descriptors() -> None:
    """Who was started without them would otherwise write to whatever file gets their numbers later."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)


class _Size(click.ParamType[int]):
    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return value if isinstance(value, int) else parse_size(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class _Seconds(click.ParamType[float]):
    name = "seconds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            return value if isinstance(value, float) else parse_duration(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class _Setting(click.ParamType[tuple[str, str]]):
    name = "name=value"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, str]:
        name, sign, setting = value.partition("=")
        if not (name and sign and setting):
            self.fail(f"{value!r} is not a setting; write it like hot=64MiB", param, ctx)
        return name, setting


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="kvmmig")
def cli() -> None:
    """Run tiny KVM guests and migrate them while they run.

    \b
    Two terminals show what it is for:
      kvmmig run --incoming tcp:127.0.0.1:4444
      kvmmig run dirtier --memory 1GiB --migrate-to tcp:127.0.0.1:4444
    """


@cli.command(
    short_help="Run a guest; migrate it; take one in.",
    epilog="""\b
Exit status:
  the guest's own   when it ended by itself (0 too when it asked for a reset)
  0                 when it has moved away
  1                 when something failed; with --migrate-to also when
                    the guest did not move: it then goes on here until
                    it ends, and its own status does not count
  2                 for a command line that makes no sense
  70                when the guest crashed
  129, 130, 143     when SIGHUP, Ctrl-C or SIGTERM ended it

\b
Examples:
  kvmmig run hello
  kvmmig run ./my-guest.asm --set hot=8MiB --cpus 2
  kvmmig run disk.img --entry real16 --memory 150MiB
  kvmmig run dirtier --memory 1GiB --migrate-to file:/var/tmp/dirtier.img --after 2
  kvmmig run --incoming file:/var/tmp/dirtier.img
""",
)
@click.argument("guest", required=False, metavar="[GUEST|FILE]")
@click.option(
    "--entry",
    type=click.Choice(["real16", "long64", "elf"]),
    help="How a flat image starts: in real mode at 0x7c00, or in 64-bit mode at 1 MiB. An ELF and an .asm "
    "say it themselves.",
)
@click.option("--memory", type=_Size(), metavar="SIZE", help="Guest memory.  [default: 256MiB]")
@click.option("--cpus", type=int, metavar="N", help="Number of vCPUs.  [default: 1]")
@click.option(
    "--set",
    "settings",
    type=_Setting(),
    multiple=True,
    metavar="NAME=VALUE",
    help='A toy guest\'s parameter, any number of times; "kvmmig guests" lists them.',
)
@click.option(
    "--serial",
    default="-",
    metavar="PATH|-",
    help="Where the guest's serial port leads: a file to append to, a named pipe, a terminal; - is standard "
    "input and output.  [default: -]",
)
@click.option("--migrate-to", metavar="URI", help='Move the guest there; "kvmmig transports" lists the ways.')
@click.option(
    "--after",
    type=_Seconds(),
    metavar="SECONDS",
    help="How long it runs here before it is moved.  [default: 1]",
)
@click.option(
    "--incoming", metavar="URI", help="Take in the guest that comes this way, instead of a new one."
)
def run(
    guest: str | None,
    entry: str | None,
    memory: int | None,
    cpus: int | None,
    settings: tuple[tuple[str, str], ...],
    serial: str,
    migrate_to: str | None,
    after: float | None,
    incoming: str | None,
) -> int:
    """Run GUEST, a toy guest's name, or FILE: an .asm, a static ELF64 executable, a flat image.

    It runs until the guest ends. Its serial port is this terminal; Ctrl-C ends it. With --migrate-to it is
    moved while it runs, and with --incoming a guest from elsewhere goes on here.
    """
    if incoming is not None:
        given = {
            "GUEST": guest,
            "--entry": entry,
            "--memory": memory,
            "--cpus": cpus,
            "--set": settings or None,
            "--migrate-to": migrate_to,
            "--after": after,
        }
        wrong = [name for name, value in given.items() if value is not None]
        if wrong:
            raise click.UsageError(
                f"--incoming takes a guest in just as it is elsewhere, so {' and '.join(wrong)} can't go "
                "with it"
            )
    elif guest is None:
        raise click.UsageError(
            "name a guest or a file to run (kvmmig guests lists the guests), or --incoming URI"
        )
    if after is not None and migrate_to is None:
        raise click.UsageError("--after says when to move, so it needs --migrate-to URI")

    from kvmmig.cli.run import Leaving, NewGuest, run_guest, run_incoming

    if guest is None:
        assert incoming is not None
        return run_incoming(incoming, serial=serial)
    return run_guest(
        NewGuest(
            what=guest,
            entry=entry,
            memory=256 << 20 if memory is None else memory,
            cpus=1 if cpus is None else cpus,
            settings=dict(settings),
        ),
        serial=serial,
        leaving=Leaving(uri=migrate_to, after=1.0 if after is None else after) if migrate_to else None,
    )


@cli.command(
    epilog="""\b
Example:
  kvmmig doctor && kvmmig demo
"""
)
def doctor() -> int:
    """Say what this host's KVM can do, what is missing, and how to mend it.

    The exit status is 0 when kvmmig can work here, else 1.
    """
    from kvmmig.cli.doctor import examine

    return examine()


@cli.command(
    epilog="""\b
Examples:
  kvmmig guests
  kvmmig guests dirtier > my-dirtier.asm
  kvmmig run ./my-dirtier.asm
"""
)
@click.argument("name", required=False)
def guests(name: str | None) -> None:
    """List the toy guests and their parameters, or print the source of one of them."""
    from kvmmig.cli.catalog import list_guests, print_guest

    if name is None:
        list_guests()
    else:
        print_guest(name)


@cli.command(
    epilog="""\b
Example:
  kvmmig transports
"""
)
def transports() -> None:
    """List the ways that a guest can take: built-in transports and those that packages bring."""
    from kvmmig.cli.catalog import list_transports

    list_transports()


@cli.command(
    epilog="""\b
Example:
  kvmmig demo --memory 256MiB --directory /tmp
"""
)
@click.option(
    "--memory", type=_Size(), metavar="SIZE", default="1GiB", show_default=True, help="Guest memory."
)
@click.option(
    "--directory",
    type=click.Path(),
    default="/var/tmp",
    show_default=True,
    help="Where the guests are saved; the files are removed again.",
)
def demo(memory: int, directory: str) -> int:
    """Move a busy guest over TCP, save it through a pipe and to a file, and prove that no page was lost.

    The exit status is 0 when every move was verified, else 1.
    """
    from kvmmig.cli.demo import tell

    return tell(memory=memory, directory=directory)
