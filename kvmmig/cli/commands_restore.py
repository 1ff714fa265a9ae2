"""``restore``: a machine's life that begins with a saved guest."""

from __future__ import annotations

import click

from kvmmig.cli.arguments import StoringOption, examples, record_option
from kvmmig.cli.process_options import (
    RUN_STATUSES,
    detach_option,
    max_cpus_option,
    max_memory_option,
    name_option,
    no_exec_option,
    paused_option,
    qmp_option,
    run_incoming_by,
    serial_option,
    welcome_of,
)


@click.command(
    short_help="Go on with a saved guest.",
    epilog=examples(
        "kvmmig restore /var/tmp/a.img",
        "kvmmig restore /var/tmp/a.img --name b -d",
        "kvmmig restore /var/tmp/a.img --prefault",
        more=RUN_STATUSES,
    ),
)
@click.argument("path", type=click.Path())
@name_option
@detach_option
@paused_option
@serial_option
@qmp_option
@no_exec_option
@max_memory_option
@max_cpus_option
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

    welcome = welcome_of(max_memory, max_cpus, ())
    stream = own_descriptor(path, writing=False) if path == "-" or transport in ("file", "pipe") else None
    if stream is not None:
        fd = stream
        return run_incoming_by(
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
    return run_incoming_by(
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
