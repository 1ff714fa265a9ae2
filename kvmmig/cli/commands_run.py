"""``run`` and ``restore``: the commands that are a machine's life."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import click

from kvmmig.cli.arguments import (
    Cpus,
    GuestOrFile,
    Memory,
    Seconds,
    StoringOption,
    examples,
    record_option,
    secret_file_option,
)
from kvmmig.cli.completion import URI, ParameterSetting
from kvmmig.cli.secretfile import with_secret

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmmig.migration.welcome import Welcome
    from kvmmig.transport.uri import TransportURI

_STATUSES = """\b
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

_name_option = click.option(
    "--name",
    metavar="NAME",
    help="What other commands call it.  [default: the guest's or the file's name; with a number where that "
    "is taken]",
)
_detach_option = click.option(
    "-d",
    "--detach",
    is_flag=True,
    help="Go on in the background: return when it runs, print its name, and leave its messages in a log.",
)
_paused_option = click.option(
    "--paused", is_flag=True, help='Have the guest ready, and paused: "kvmmig resume NAME" lets it run.'
)
_serial_option = click.option(
    "--serial",
    default="-",
    metavar="PATH|-",
    help="Where the guest's serial port leads: a file to append to, a named pipe, a terminal; - is standard "
    'input and output, or with --detach nothing but "kvmmig console".  [default: -]',
)
_qmp_option = click.option(
    "--qmp",
    multiple=True,
    metavar="ADDRESS",
    help="Serve QMP here too, any number of times: unix:PATH, tcp:HOST:PORT[,secret-file=PATH], or fd:N, a "
    "socket that this command was started with. As with QEMU, ,server=off connects there, and "
    ",server=on,wait=on waits for a client.",
)
_no_exec_option = click.option(
    "--no-exec",
    is_flag=True,
    help="Whoever controls the machine may have it start no programs: no exec:, no helper= of pipe:.",
)
_pass_fd_option = click.option(
    "--pass-fd",
    "pass_fds",
    type=click.IntRange(min=0),
    multiple=True,
    metavar="N",
    help="Let a monitor's client, too, name the descriptor N that this command was started with: fd:N, any "
    "number of times; no other number means anything there.",
)


_max_memory_option = click.option(
    "--max-memory", type=Memory(), metavar="SIZE", help="Take in no guest that has more memory."
)
_max_cpus_option = click.option(
    "--max-cpus", type=Cpus(), metavar="N", help="Take in no guest that has more vCPUs."
)


@click.command(
    short_help="Run a guest, a new or an incoming one; migrate it.",
    epilog=examples(
        "kvmmig run hello",
        "kvmmig run dirtier --name a -m 1GiB -d",
        "kvmmig run ./my-guest.asm --set hot=8MiB --cpus 2",
        "kvmmig run floppy.img",
        "kvmmig run disk.img --entry real16 --memory 150MiB",
        "kvmmig run dirtier -m 1GiB --migrate-to file:/var/tmp/dirtier.img",
        "kvmmig run --incoming file:/var/tmp/dirtier.img",
        "kvmmig run --incoming tcp:0.0.0.0:4444 --secret-file secret --max-memory 4GiB",
        "kvmmig run --incoming tcp:0.0.0.0:4444 --reserve 1GiB",
        "kvmmig run --incoming defer --qmp tcp:127.0.0.1:4445",
        more=_STATUSES,
    ),
)
@click.argument("guest", required=False, metavar="[GUEST|FILE]", type=GuestOrFile())
@click.option(
    "--entry",
    type=click.Choice(["real16", "long64", "elf"]),
    help="How a flat image starts: in real mode at 0x7c00, or in 64-bit mode at 1 MiB. An ELF and an .asm "
    "say it themselves.",
)
@click.option(
    "--on-halt",
    type=click.Choice(["end", "stay"]),
    help="What becomes of a guest that can do nothing any more, such as one that has halted with interrupts "
    "off: it ends, or it stays and can be looked at.  [default: end]",
)
@click.option("-m", "--memory", type=Memory(), metavar="SIZE", help="Guest memory.  [default: 256MiB]")
@click.option("--cpus", type=Cpus(), metavar="N", help="Number of vCPUs.  [default: 1]")
@click.option(
    "--set",
    "settings",
    type=ParameterSetting(),
    multiple=True,
    metavar="NAME=VALUE",
    help='A toy guest\'s parameter, any number of times; "kvmmig guests" lists them.',
)
@_name_option
@_detach_option
@_paused_option
@_serial_option
@_qmp_option
@_no_exec_option
@_pass_fd_option
@click.option(
    "--migrate-to",
    type=URI(),
    metavar="URI",
    help='Move the guest there; "kvmmig transports" lists the ways.',
)
@click.option(
    "--after",
    type=Seconds(),
    metavar="SECONDS",
    help="How long it runs here before it is moved.  [default: 1]",
)
@click.option(
    "--incoming",
    type=URI(also="defer"),
    metavar="URI|defer",
    help='Run the guest that comes by migration from there, instead of a new one; "defer" waits until a '
    "monitor's migrate-incoming says from where.",
)
@record_option
@_max_memory_option
@_max_cpus_option
@click.option(
    "--accept-from",
    multiple=True,
    metavar="WHO",
    help="With --incoming, from whom a guest may come, any number of times: an address, a network "
    "(192.0.2.0/24), user:NAME for a user of this host, or any.  [default: this user and root, and other "
    "hosts]",
)
@secret_file_option
@click.option(
    "--reserve",
    type=Memory(),
    metavar="SIZE",
    help="With --incoming: have so much memory ready before the guest comes; as much as it has is best.",
)
def run(
    guest: str | None,
    entry: str | None,
    on_halt: Literal["end", "stay"] | None,
    memory: int | None,
    cpus: int | None,
    settings: tuple[tuple[str, str], ...],
    name: str | None,
    detach: bool,
    paused: bool,
    serial: str,
    qmp: tuple[str, ...],
    no_exec: bool,
    pass_fds: tuple[int, ...],
    migrate_to: str | None,
    after: float | None,
    incoming: str | None,
    record: str | None,
    max_memory: int | None,
    max_cpus: int | None,
    accept_from: tuple[str, ...],
    secret_file: str | None,
    reserve: int | None,
) -> int:
    """Run GUEST, a toy guest's name, or FILE: an .asm, a static ELF64 executable, a flat image.

    It runs until the guest ends. Its serial port is this terminal; Ctrl-C ends it. With --migrate-to it is
    moved while it runs, and with --incoming a guest from elsewhere goes on here. While it runs, "kvmmig
    status", "migrate", "console" and others find it by its name.
    """
    if incoming is not None:
        given = {
            "GUEST": guest,
            "--entry": entry,
            "--on-halt": on_halt,
            "--memory": memory,
            "--cpus": cpus,
            "--set": settings or None,
            "--migrate-to": migrate_to,
            "--after": after,
        }
        wrong = [option for option, value in given.items() if value is not None]
        if wrong:
            raise click.UsageError(
                f"with --incoming a guest is as it was at its source, so {' and '.join(wrong)} can't go "
                "with it"
            )
        if incoming == "defer" and secret_file is not None:
            raise click.UsageError("with --incoming defer a client names the secret, by secret+ in its URI")
        uri = with_secret(_uri(incoming), secret_file) if incoming != "defer" else None
        welcome = _welcome(max_memory, max_cpus, accept_from)
        _inherit(pass_fds)
        return _run_incoming(
            lambda: uri,
            welcome=welcome,
            name=name,
            detach=detach,
            paused=paused,
            serial=serial,
            qmp=qmp,
            no_exec=no_exec,
            reserve=reserve,
            record=record,
        )
    if guest is None:
        raise click.UsageError(
            "name a guest or a file to run (kvmmig guests lists the guests), or --incoming URI"
        )
    bounds: dict[str, object] = {
        "--max-memory": max_memory,
        "--max-cpus": max_cpus,
        "--accept-from": accept_from,
        "--reserve": reserve,
    }
    if unused := [option for option, value in bounds.items() if value]:
        raise click.UsageError(
            f"{' and '.join(unused)}: that is for a guest that comes, so it needs --incoming URI"
        )
    if secret_file is not None and migrate_to is None:
        raise click.UsageError("--secret-file is for a guest that moves: --incoming URI or --migrate-to URI")
    if after is not None and migrate_to is None:
        raise click.UsageError("--after says when to move, so it needs --migrate-to URI")

    if paused and migrate_to is not None:
        raise click.UsageError("--migrate-to moves a guest that runs, so --paused can't go with it")

    from kvmmig.cli.detach import Background, perhaps_in_background

    to = with_secret(_uri(migrate_to), secret_file) if migrate_to is not None else None
    if to is not None:
        from kvmmig.cli.storing import checked

        to = checked(to)
    _inherit(pass_fds)
    _inherit_monitors(qmp)

    def life(background: Background | None) -> int:
        from kvmmig.cli.machine_process import ProcessOptions
        from kvmmig.cli.run import NewGuest, PlannedMigration, run_guest

        planned = PlannedMigration(uri=to, after=1.0 if after is None else after) if to is not None else None

        return run_guest(
            NewGuest(
                what=guest,
                entry=entry,
                memory=256 << 20 if memory is None else memory,
                cpus=1 if cpus is None else cpus,
                settings=dict(settings),
                on_halt=on_halt or "end",
            ),
            ProcessOptions(
                name=name,
                paused=paused,
                serial=serial,
                qmp=qmp,
                no_exec=no_exec,
                record=record,
                background=background,
            ),
            planned=planned,
        )

    return perhaps_in_background(detach, life)


@click.command(
    short_help="Go on with a saved guest.",
    epilog=examples(
        "kvmmig restore /var/tmp/a.img",
        "kvmmig restore /var/tmp/a.img --name b -d",
        "kvmmig restore /var/tmp/a.img --prefault",
        more=_STATUSES,
    ),
)
@click.argument("path", type=click.Path())
@_name_option
@_detach_option
@_paused_option
@_serial_option
@_qmp_option
@_no_exec_option
@_max_memory_option
@_max_cpus_option
@click.option(
    "--transport",
    cls=StoringOption,
    help="What reads it: this process (file), a helper (pipe; either reads what the other has written), or "
    "another transport that stores.",
)
@record_option
@click.option(
    "--prefault",
    is_flag=True,
    help="Read all of the image while the guest runs, and check it: then it needs the file no more.",
)
def restore(
    path: str,
    name: str | None,
    detach: bool,
    paused: bool,
    serial: str,
    qmp: tuple[str, ...],
    no_exec: bool,
    max_memory: int | None,
    max_cpus: int | None,
    transport: str,
    record: str | None,
    prefault: bool,
) -> int:
    """Go on with the guest that "kvmmig save" has left in PATH. The file stays, and can be restored again.

    It runs at once, and reads its pages from the file as it uses them: nobody may write to the file, or
    truncate it, until the guest has ended or --prefault has read it to its end. To remove it, or to save to
    the same PATH again, is safe.

    - is standard input: a pipe, a file, a block device.
    """
    import os

    from kvmmig.cli.storing import storing_uri
    from kvmmig.cli.streams import incoming_uri, own_descriptor

    welcome = _welcome(max_memory, max_cpus, ())
    stream = own_descriptor(path, writing=False) if path == "-" or transport in ("file", "pipe") else None
    if stream is not None:
        fd = stream
        return _run_incoming(
            lambda: incoming_uri(fd),
            welcome=welcome,
            name=name,
            default_name="restored",
            detach=detach,
            paused=paused,
            serial=serial,
            qmp=qmp,
            no_exec=no_exec,
            record=record,
            prefault=prefault,
        )
    uri = storing_uri(transport, path)
    stem = os.path.splitext(os.path.basename(path))[0]
    return _run_incoming(
        lambda: uri,
        welcome=welcome,
        name=name,
        default_name=stem,
        detach=detach,
        paused=paused,
        serial=serial,
        qmp=qmp,
        no_exec=no_exec,
        record=record,
        prefault=prefault,
    )


def _welcome(max_memory: int | None, max_cpus: int | None, accept_from: tuple[str, ...]) -> Welcome:
    from kvmmig.migration.welcome import Welcome

    try:
        return Welcome.of(max_memory=max_memory, max_cpus=max_cpus, accept_from=accept_from)
    except ValueError as error:
        raise click.UsageError(f"--accept-from: {error}") from error


def _uri(text: str) -> TransportURI:
    """Where a guest comes from, or goes to; the descriptor that it names is this command's own."""
    from kvmmig.transport.uri import TransportURI

    uri = TransportURI.parse(text)
    if uri.scheme == "fd" and uri.target:
        from kvmmig.transport import descriptors

        number = descriptors.number_of(uri.target)
        if number is not None:
            descriptors.inherit(number)
    return uri


def _inherit(numbers: tuple[int, ...]) -> None:
    if numbers:
        from kvmmig.transport import descriptors

        for number in numbers:
            descriptors.inherit(number)


def _inherit_monitors(addresses: tuple[str, ...]) -> None:
    """Keep what ``--qmp fd:N`` names from getting lost: see `kvmmig.transport.descriptors.inherit`."""
    if any("fd" in address for address in addresses):
        from kvmmig.qmp.address import FdAddress, parse_address

        parsed = [parse_address(address) for address in addresses]
        _inherit(tuple(address.number for address in parsed if isinstance(address, FdAddress)))


def _run_incoming(
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

    _inherit_monitors(qmp)

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
