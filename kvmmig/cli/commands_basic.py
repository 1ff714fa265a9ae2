"""The commands that are about no machine: what this host can do, and what there is to choose from."""

from __future__ import annotations

import click

from kvmmig.cli.arguments import GuestName, Memory, examples, json_option


@click.command(
    short_help="Say what this host's KVM can do.",
    epilog=examples("kvmmig doctor && kvmmig demo", "kvmmig doctor --json"),
)
@json_option
def doctor(as_json: bool) -> int:
    """Say what this host's KVM can do, what is missing, and how to mend it.

    The exit status is 0 when kvmmig can work here, else 1.
    """
    from kvmmig.cli.doctor import examine

    return examine(as_json=as_json)


@click.command(
    short_help="List the toy guests, or print one.",
    epilog=examples(
        "kvmmig guests",
        "kvmmig guests --json",
        "kvmmig guests dirtier > my-dirtier.asm",
        "kvmmig run ./my-dirtier.asm",
    ),
)
@click.argument("name", required=False, type=GuestName())
@json_option
def guests(name: str | None, as_json: bool) -> None:
    """List the toy guests and their parameters, or print the source of one of them."""
    from kvmmig.cli.catalog import list_guests, print_guest

    if name is None:
        list_guests(as_json=as_json)
    elif as_json:
        raise click.UsageError("--json lists all guests, so no NAME can go with it")
    else:
        print_guest(name)


@click.command(
    short_help="List the transports and wrappers.",
    epilog=examples("kvmmig transports", "kvmmig transports --json"),
)
@json_option
def transports(as_json: bool) -> None:
    """List the transports, and the wrappers around them: built-in ones and those that packages bring."""
    from kvmmig.cli.catalog import list_transports

    list_transports(as_json=as_json)


@click.command(
    short_help="Move and save a busy guest, with proof.",
    epilog=examples("kvmmig demo --memory 256MiB --directory /tmp", "kvmmig demo -m 256MiB --json"),
)
@click.option(
    "-m", "--memory", type=Memory(), metavar="SIZE", default="1GiB", show_default=True, help="Guest memory."
)
@click.option(
    "--directory",
    type=click.Path(),
    default="/var/tmp",
    show_default=True,
    help="Where the guests are saved; the files are removed again.",
)
@json_option
def demo(memory: int, directory: str, as_json: bool) -> int:
    """Move a busy guest over TCP, save it through a pipe and to a file, and prove that no page was lost.

    The exit status is 0 when every move was verified, else 1. With --json the figures are printed at the end.
    """
    from kvmmig.cli.demo import run_demo

    return run_demo(memory=memory, directory=directory, as_json=as_json)


@click.command(
    short_help="Say which version this is.", epilog=examples("kvmmig version", "kvmmig version --json")
)
@json_option
def version(as_json: bool) -> None:
    """Say which versions of kvmmig, Python and the kernel these are."""
    from kvmmig.cli.catalog import print_version

    print_version(as_json=as_json)


@click.command(
    short_help="Have a shell complete all this.",
    epilog=examples(
        'eval "$(kvmmig completion bash)"                                 in ~/.bashrc',
        "autoload -Uz compinit && compinit                                in ~/.zshrc, before",
        'eval "$(kvmmig completion zsh)"                                  in ~/.zshrc',
        "kvmmig completion fish > ~/.config/fish/completions/kvmmig.fish  once",
    ),
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print what makes SHELL complete kvmmig's commands, options, guests, URIs, settings and machines.

    zsh completes nothing before "compinit" has run, so that comes before it.
    """
    from kvmmig.cli.completion import script

    click.echo(script(shell, click.get_current_context().find_root().command))
