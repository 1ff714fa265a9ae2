"""``new-guest``: a guest to begin with."""

from __future__ import annotations

import click

from kvmmig.cli.arguments import examples


@click.command(
    "new-guest",
    short_help="Write a guest of your own to begin with.",
    epilog=examples(
        "kvmmig new-guest first && kvmmig run ./first.asm",
        "kvmmig new-guest second --lang c && make -C second && kvmmig run second/second.elf",
    ),
)
@click.argument("name")
@click.option(
    "--lang",
    type=click.Choice(["asm", "c"]),
    default="asm",
    show_default=True,
    help="asm: NAME.asm, which nasm assembles when it is run. c: NAME/ with its linker script and Makefile.",
)
def new_guest(name: str, lang: str) -> None:
    """Write a small guest called NAME here, which runs as it is.

    docs/guests.md tells what a guest finds, and what it may do.
    """
    from pathlib import Path

    from kvmmig.cli.printing import echo
    from kvmmig.guests.skeleton import write_skeleton

    files = write_skeleton(name, lang, Path())
    for path in files:
        echo(str(path))
    run = f"make -C {name} && kvmmig run {name}/{name}.elf" if lang == "c" else f"kvmmig run ./{files[0]}"
    echo(f"kvmmig: run it: {run}", err=True)
