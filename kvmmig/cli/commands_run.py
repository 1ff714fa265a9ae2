"""``run``: the command that is a machine's life."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import click

from kvmmig.cli.arguments import (
    Count,
    GuestOrFile,
    Memory,
    Seconds,
    examples,
    record_option,
    secret_file_option,
)
from kvmmig.cli.completion import URI, ParameterSetting
from kvmmig.cli.process_options import (
    RUN_STATUSES,
    detach_option,
    inherit,
    inherit_monitors,
    max_cpus_option,
    max_memory_option,
    name_option,
    no_exec_option,
    own_uri,
    pass_fd_option,
    paused_option,
    qmp_option,
    run_incoming_by,
    serial_option,
    welcome_of,
)
from kvmmig.cli.secretfile import with_secret
from kvmmig.units import CPUS

if TYPE_CHECKING:
    pass


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
        more=RUN_STATUSES,
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
@click.option("--cpus", type=Count(CPUS), metavar="N", help="Number of vCPUs.  [default: 1]")
@click.option(
    "--set",
    "settings",
    type=ParameterSetting(),
    multiple=True,
    metavar="NAME=VALUE",
    help='A toy guest\'s parameter, any number of times; "kvmmig guests" lists them.',
)
@name_option
@detach_option
@paused_option
@serial_option
@qmp_option
@no_exec_option
@pass_fd_option
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
@max_memory_option
@max_cpus_option
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
        uri = with_secret(own_uri(incoming), secret_file) if incoming != "defer" else None
        welcome = welcome_of(max_memory, max_cpus, accept_from)
        inherit(pass_fds)
        return run_incoming_by(
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

    to = with_secret(own_uri(migrate_to), secret_file) if migrate_to is not None else None
    if to is not None:
        from kvmmig.cli.storing import checked

        to = checked(to)
    inherit(pass_fds)
    inherit_monitors(qmp)

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
