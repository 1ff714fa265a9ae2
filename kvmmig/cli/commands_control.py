"""The commands that look at machines that run, and control them."""

from __future__ import annotations

import click

from kvmmig.cli.arguments import Count, examples, json_option, machine_argument, machines_argument
from kvmmig.cli.completion import SettingOrValue
from kvmmig.units import PORT


@click.command(short_help="List the machines that run.", epilog=examples("kvmmig ls", "kvmmig ls --json"))
@json_option
def ls(as_json: bool) -> int:
    """List the machines that run, with what they have and what they do."""
    from kvmmig.cli.listing import list_machines

    return list_machines(as_json=as_json)


@click.command(
    short_help="Show machines and their migrations.",
    epilog=examples(
        "kvmmig status a",
        "kvmmig status a b",
        "kvmmig status a --watch",
        "kvmmig status a --json | jq .migration.phase",
    ),
)
@machines_argument
@click.option("--watch", is_flag=True, help="Go on showing it, until Ctrl-C or until the machine ends.")
@json_option
def status(names: tuple[str, ...], watch: bool, as_json: bool) -> int:
    """Show the state of the machine NAME, and the figures of its migration while there is one.

    With --json, there is one JSON object for each NAME. With --watch and --json, there is one a second.
    """
    if watch and len(names) > 1:
        raise click.UsageError(f"--watch shows one machine, so choose one of {', '.join(names)}")
    from kvmmig.cli.listing import show_status
    from kvmmig.cli.remote import for_each

    return for_each(names, lambda name: show_status(name, watch=watch, as_json=as_json))


@click.command(
    short_help="Watch a machine and its migration.",
    epilog=examples("kvmmig watch a", "kvmmig watch a --web", "kvmmig watch a --web --port 8000 --insecure"),
)
@machine_argument
@click.option("--web", is_flag=True, help="Serve a page on this host's loopback, for any number of browsers.")
@click.option(
    "--port", type=Count(PORT), metavar="N", help="Where the page is; a free port where this is left out."
)
@click.option("--insecure", is_flag=True, help="Let every user of this host see the page.")
def watch(name: str, web: bool, port: int | None, insecure: bool) -> int:
    """Show the machine NAME and its migration as it happens, here or with --web in browsers.

    The page has the rounds, the pages, the rates, what was stalled, and the downtime. It can only be read, by
    the processes of this user and of root. It needs the extra "web": pip install 'kvmmig[web]'. Without --web
    this is "kvmmig status NAME --watch".
    """
    if web:
        from kvmmig.cli.livepage.watching import serve_page

        return serve_page(name, port=port or 0, insecure=insecure)
    if port is not None or insecure:
        raise click.UsageError("--port and --insecure are about the page, so add --web")
    from kvmmig.cli.listing import show_status

    return show_status(name, watch=True, as_json=False)


@click.command(
    short_help="Show what a machine has said.",
    epilog=examples("kvmmig logs a", "kvmmig logs a -f"),
)
@machines_argument
@click.option("-f", "--follow", is_flag=True, help="Go on with what comes, until the machine ends.")
def logs(names: tuple[str, ...], follow: bool) -> int:
    """Show the messages of the machine NAME, and what its guest has written to its serial port.

    The messages of a machine in the background come first. Of the serial port there are the last 64 KiB. The
    log of a machine that has ended stays until its name is used again.
    """
    if follow and len(names) > 1:
        raise click.UsageError(f"--follow shows one machine, so choose one of {', '.join(names)}")
    from kvmmig.cli.remote import for_each
    from kvmmig.cli.saidlog import show_log

    return for_each(names, lambda name: show_log(name, follow=follow))


@click.command(short_help="Stop machines' vCPUs.", epilog=examples("kvmmig pause a", "kvmmig pause a b"))
@machines_argument
def pause(names: tuple[str, ...]) -> int:
    """Stop the vCPUs of the machine NAME. It keeps all that it has, and "kvmmig resume" lets it go on."""
    from kvmmig.cli.remote import execute, for_each

    return for_each(names, lambda name: execute(name, "stop"))


@click.command(
    short_help="Let paused machines go on.", epilog=examples("kvmmig resume a", "kvmmig resume a --force")
)
@machines_argument
@click.option(
    "--force",
    is_flag=True,
    help="Take the guest back whose migration's outcome is unknown. Only when it does not run on the other "
    "side: look there first.",
)
def resume(names: tuple[str, ...], force: bool) -> int:
    """Let the paused machine NAME go on."""
    from kvmmig.cli.remote import execute, for_each

    return for_each(names, lambda name: execute(name, "x-kvmmig-take-back" if force else "cont"))


@click.command(short_help="Start machines' guests again.", epilog=examples("kvmmig reset a"))
@machines_argument
def reset(names: tuple[str, ...]) -> int:
    """Start the guest of the machine NAME again, as it was loaded."""
    from kvmmig.cli.remote import execute, for_each

    return for_each(names, lambda name: execute(name, "system_reset"))


@click.command("quit", short_help="End machines.", epilog=examples("kvmmig quit a", "kvmmig stop a b"))
@machines_argument
def quit_machine(names: tuple[str, ...]) -> int:
    """End the machine NAME, whatever its guest is doing. Returns when it is gone.

    "kvmmig stop" is the same, as docker has it. What QEMU's monitor calls "stop" is "kvmmig pause".
    """
    from kvmmig.cli.remote import for_each
    from kvmmig.cli.remote import quit_machine as quit_and_wait

    return for_each(names, quit_and_wait)


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
        "kvmmig set a --json | jq .bandwidth",
        "kvmmig set a downtime-limit 50ms bandwidth 500MB/s",
        "kvmmig set a bandwidth none auto-converge on",
        "kvmmig set a throttle.rate 20MB/s",
    ),
)
@machine_argument
@click.argument("settings", nargs=-1, type=SettingOrValue(), metavar="[SETTING VALUE]...")
@json_option
def set_settings(name: str, settings: tuple[str, ...], as_json: bool) -> int:
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
    if pairs and as_json:
        raise click.UsageError("--json lists the settings, so no SETTING can go with it")
    return change(name, pairs) if pairs else show(name, as_json=as_json)
