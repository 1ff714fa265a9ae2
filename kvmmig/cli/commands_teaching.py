"""``lab``: the teaching labs."""

from __future__ import annotations

from pathlib import Path

import click

from kvmmig.cli.arguments import examples


@click.group(
    short_help="Do a teaching lab.", epilog=examples("kvmmig lab start 1 my-lab", "kvmmig lab check my-lab")
)
def lab() -> None:
    """Do a teaching lab: a handout, a file with gaps to fill, and a check that says what is still wrong."""


@lab.command("list", epilog=examples("kvmmig lab list"))
def list_labs() -> int:
    """List the labs."""
    from kvmmig.cli.printing import echo
    from kvmmig.lab.teaching.labs import labs

    for each in labs():
        echo(f"{each.number}  {each.title}")
    return 0


@lab.command(epilog=examples("kvmmig lab start 1 my-lab"))
@click.argument("number", type=int)
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
def start(number: int, directory: Path) -> int:
    """Copy the lab NUMBER to the new directory DIR; its README.md is the handout."""
    from kvmmig.cli.printing import echo
    from kvmmig.lab.teaching.labs import find_lab, start_lab

    start_lab(find_lab(number), directory)
    echo(f"read {directory / 'README.md'}, fill the gaps in {directory / 'student.py'}, and ask: ", nl=False)
    echo(f"kvmmig lab check {directory}")
    return 0


@lab.command(epilog=examples("kvmmig lab check my-lab"))
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
def check(directory: Path) -> int:
    """Say what is still wrong in DIR, and why. The exit status is 0 when nothing is, else 1."""
    from kvmmig.cli.printing import echo
    from kvmmig.lab.teaching.labs import check_lab

    wrong = check_lab(directory)
    for sentence in wrong:
        echo(f"- {sentence}")
    if not wrong:
        echo("nothing is wrong")
    return 1 if wrong else 0


@lab.command("knock-out", epilog=examples("kvmmig lab knock-out", "kvmmig lab knock-out cpu0/xsave"))
@click.argument("section", required=False)
def leave_out(section: str | None) -> int:
    """Move a guest without one SECTION of its state, and tell what becomes of it.

    Without SECTION, list those that there are.
    """
    from kvmmig.cli.missing_state import list_sections, show_without

    return show_without(section) if section else list_sections()
