"""The commands that look at machines that run, and control them."""

from __future__ import annotations

import click

from kvmmig.cli.arguments import MachineName, examples, json_option, machine_argument


@click.command(short_help="List the machines that run.", epilog=examples("kvmmig ls", "kvmmig ls --json"))
@json_option
def ls(as_json: bool) -> int:
    """List the machines that run, with what they have and what they do."""
    from kvmmig.cli.listing import list_machines

    return list_machines(as_json=as_json)


@click.command(
    short_help="Show a machine and its migration.",
    epilog=examples(
        "kvmmig status a",
        "kvmmig status a --watch",
        "kvmmig status a --json | jq .migration.phase",
    ),
)
@machine_argument
@click.option("--watch", is_flag=True, help="Go on showing it, until Ctrl-C or until the machine ends.")
@json_option
def status(name: str, watch: bool, as_json: bool) -> int:
    """Show the state of the machine NAME, and the figures of its migration while there is one.

    With --watch and --json, a line of JSON is printed each second.
    """
    from kvmmig.cli.listing import show_status

    return show_status(name, watch=watch, as_json=as_json)


@click.command(short_help="Stop a machine's vCPUs.", epilog=examples("kvmmig pause a"))
@machine_argument
def pause(name: str) -> int:
    """Stop the vCPUs of the machine NAME. It keeps all that it has, and "kvmmig resume" lets it go on."""
    from kvmmig.cli.remote import execute

    return execute(name, "stop")


@click.command(
    short_help="Let a paused machine go on.", epilog=examples("kvmmig resume a", "kvmmig resume a --force")
)
@machine_argument
@click.option(
    "--force",
    is_flag=True,
    help="Take the guest back whose migration's outcome is unknown. Only when it does not run on the other "
    "side: look there first.",
)
def resume(name: str, force: bool) -> int:
    """Let the paused machine NAME go on."""
    from kvmmig.cli.remote import execute

    return execute(name, "x-kvmmig-take-back" if force else "cont")


@click.command(short_help="Start a machine's guest again.", epilog=examples("kvmmig reset a"))
@machine_argument
def reset(name: str) -> int:
    """Start the guest of the machine NAME again, as it was loaded."""
    from kvmmig.cli.remote import execute

    return execute(name, "system_reset")


@click.command("quit", short_help="End a machine.", epilog=examples("kvmmig quit a"))
@click.argument("name", type=MachineName())
def quit_machine(name: str) -> int:
    """End the machine NAME, whatever its guest is doing. Returns when it is gone."""
    from kvmmig.cli.remote import quit_machine as quit_and_wait

    return quit_and_wait(name)


@click.command(
    short_help="Use a machine's serial port.",
    epilog=examples("kvmmig console a", "kvmmig console a < /dev/null | tee serial.log"),
)
@machine_argument
def console(name: str) -> int:
    """Show what the guest of the machine NAME writes to its serial port, and type at it. Ctrl-] leaves it.

    It begins with the last 64 KiB. Several may watch at once; one who reads too slowly loses some of it.
    Where standard input is no terminal, all of it is typed, and what the guest writes is shown until the
    machine ends.
    """
    from kvmmig.cli.console import attach

    return attach(name)


@click.command(
    "set",
    short_help="Change what holds for migrations.",
    epilog=examples(
        "kvmmig set a",
        "kvmmig set a downtime-limit 50ms bandwidth 500MB/s",
        "kvmmig set a bandwidth none auto-converge on",
        "kvmmig set a throttle.rate 20MB/s",
    ),
)
@machine_argument
@click.argument("settings", nargs=-1, metavar="[SETTING VALUE]...")
def set_settings(name: str, settings: tuple[str, ...]) -> int:
    """Change what holds for migrations of the machine NAME: for the one that runs, and for later ones.

    Without a SETTING, all of them are listed with their values. A name with a dot is a knob of the
    migration that runs, as its transport and its wrappers have them.
    """
    if len(settings) % 2:
        raise click.UsageError(
            f"{settings[-1]} has no value; write it like: kvmmig set a downtime-limit 50ms"
        )
    from kvmmig.cli.settings import change, show

    pairs = list(zip(settings[::2], settings[1::2], strict=True))
    return change(name, pairs) if pairs else show(name)
