"""The commands that are about no machine: what this host can do, and what there is to choose from."""

from __future__ import annotations

import click

from kvmmig.cli.arguments import Memory


@click.command(
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


@click.command(
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


@click.command(
    epilog="""\b
Example:
  kvmmig transports
"""
)
def transports() -> None:
    """List the transports, and the wrappers around them: built-in ones and those that packages bring."""
    from kvmmig.cli.catalog import list_transports

    list_transports()


@click.command(
    epilog="""\b
Example:
  kvmmig demo --memory 256MiB --directory /tmp
"""
)
@click.option(
    "--memory", type=Memory(), metavar="SIZE", default="1GiB", show_default=True, help="Guest memory."
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
    from kvmmig.cli.demo import run_demo

    return run_demo(memory=memory, directory=directory)


@click.command(
    epilog="""\b
Examples:
  eval "$(kvmmig completion bash)"                                 in ~/.bashrc
  eval "$(kvmmig completion zsh)"                                  in ~/.zshrc
  kvmmig completion fish > ~/.config/fish/completions/kvmmig.fish  once
"""
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print what makes SHELL complete kvmmig's commands, options, guests and the names of machines."""
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    script = kind(click.get_current_context().find_root().command, {}, "kvmmig", "_KVMMIG_COMPLETE")
    click.echo(script.source_template % script.source_vars())
