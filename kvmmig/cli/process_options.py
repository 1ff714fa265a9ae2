"""What ``run`` and ``restore`` have in common: the options of a machine's process, and a guest that comes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from kvmmig.cli.arguments import Count, Memory
from kvmmig.units import CPUS

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmmig.migration.welcome import Welcome
    from kvmmig.transport.uri import TransportURI

RUN_STATUSES = """\b
Exit status:
  the guest's own   when it ended by itself (0 too when it asked for a reset)
  0                 when it has halted for good, when it has moved away,
                    when "kvmmig quit" ended it, and with --detach as
                    soon as it runs
  1                 when something failed; with --migrate-to also when
                    the guest did not move: it then goes on here until
                    it ends, and its own status does not count
  2                 for a command line that makes no sense
  70                when the guest crashed
  129, 130, 143     when SIGHUP, Ctrl-C or SIGTERM ended it"""

name_option = click.option(
    "--name",
    metavar="NAME",
    help="What other commands call it.  [default: the guest's or the file's name; with a number where that "
    "is taken]",
)
detach_option = click.option(
    "-d",
    "--detach",
    is_flag=True,
    help="Go on in the background: return when it runs, print its name, and leave its messages in a log.",
)
paused_option = click.option(
    "--paused", is_flag=True, help='Have the guest ready, and paused: "kvmmig resume NAME" lets it run.'
)
serial_option = click.option(
    "--serial",
    default="-",
    metavar="PATH|-",
    help="Where the guest's serial port leads: a file to append to, a named pipe, a terminal; - is standard "
    'input and output, or with --detach nothing but "kvmmig console".  [default: -]',
)
qmp_option = click.option(
    "--qmp",
    multiple=True,
    metavar="ADDRESS",
    help="Serve QMP here too, any number of times: unix:PATH, tcp:HOST:PORT[,secret-file=PATH], or fd:N, a "
    "socket that this command was started with. As with QEMU, ,server=off connects there, and "
    ",server=on,wait=on waits for a client.",
)
no_exec_option = click.option(
    "--no-exec",
    is_flag=True,
    help="Whoever controls the machine may have it start no programs: no exec:, no helper= of pipe:.",
)
pass_fd_option = click.option(
    "--pass-fd",
    "pass_fds",
    type=click.IntRange(min=0),
    multiple=True,
    metavar="N",
    help="Let a monitor's client, too, name the descriptor N that this command was started with: fd:N, any "
    "number of times; no other number means anything there.",
)


max_memory_option = click.option(
    "--max-memory", type=Memory(), metavar="SIZE", help="Take in no guest that has more memory."
)
max_cpus_option = click.option(
    "--max-cpus", type=Count(CPUS), metavar="N", help="Take in no guest that has more vCPUs."
)


def welcome_of(max_memory: int | None, max_cpus: int | None, accept_from: tuple[str, ...]) -> Welcome:
    from kvmmig.migration.welcome import Welcome

    try:
        return Welcome.of(max_memory=max_memory, max_cpus=max_cpus, accept_from=accept_from)
    except ValueError as error:
        raise click.UsageError(f"--accept-from: {error}") from error


def own_uri(text: str) -> TransportURI:
    """Where a guest comes from, or goes to; the descriptor that it names is this command's own."""
    from kvmmig.transport.uri import TransportURI

    uri = TransportURI.parse(text)
    if uri.scheme == "fd" and uri.target:
        from kvmmig.transport import descriptors

        number = descriptors.number_of(uri.target)
        if number is not None:
            descriptors.inherit(number)
    return uri


def inherit(numbers: tuple[int, ...]) -> None:
    if numbers:
        from kvmmig.transport import descriptors

        for number in numbers:
            descriptors.inherit(number)


def inherit_monitors(addresses: tuple[str, ...]) -> None:
    """Keep what ``--qmp fd:N`` names from getting lost: see `kvmmig.transport.descriptors.inherit`."""
    if any("fd" in address for address in addresses):
        from kvmmig.qmp.address import FdAddress, parse_address

        parsed = [parse_address(address) for address in addresses]
        inherit(tuple(address.number for address in parsed if isinstance(address, FdAddress)))


def run_incoming_by(
    source: Callable[[], TransportURI | None],
    *,
    welcome: Welcome,
    name: str | None,
    default_name: str = "incoming",
    detach: bool,
    paused: bool,
    serial: str,
    qmp: tuple[str, ...],
    no_exec: bool,
    record: str | None,
    reserve: int | None = None,
    prefault: bool = False,
) -> int:
    from kvmmig.cli.detach import Background, perhaps_in_background

    inherit_monitors(qmp)

    def life(background: Background | None) -> int:
        from kvmmig.cli.machine_process import ProcessOptions
        from kvmmig.cli.run import run_incoming

        options = ProcessOptions(
            name=name,
            paused=paused,
            serial=serial,
            qmp=qmp,
            no_exec=no_exec,
            reserve=reserve,
            record=record,
            background=background,
        )
        return run_incoming(source(), options, welcome=welcome, default_name=default_name, prefault=prefault)

    return perhaps_in_background(detach, life)
