"""What commands print: nothing else in this package writes words to a terminal, besides `Output`.

Any of the words may come from a peer, an image, a helper or another program's monitor, so none of them is
printed with a character in it that a terminal would obey. The guest's own serial output goes past this.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from kvmmig.errors import printable
from kvmmig.units import TERMINAL, parse_count

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

_LAYOUT = "\n\t"
#: Columns of a table that goes into a pipe or a file.
LOG_WIDTH = 200


def echo(text: str, *, err: bool = False, nl: bool = True) -> None:
    """Print lines of plain text."""
    click.echo(printable(text, _LAYOUT), err=err, nl=nl)


def echo_json(value: object, *, indent: bool = False) -> None:
    """Print JSON, on one line or, for people too, on many."""
    import msgspec

    data = msgspec.json.encode(value)
    text = (msgspec.json.format(data) if indent else data).decode()
    # What is left here stands in strings, where JSON has an escape for it.
    click.echo("".join(each if each.isprintable() or each == "\n" else _escaped(each) for each in text))


def words(text: str, style: str = "") -> Text:
    """Text as rich shows it: taken literally, and of one or more lines."""
    from rich.text import Text

    return Text(printable(text, _LAYOUT), style)


def console(*, width: int | None = None, highlight: bool = False) -> Console:
    """What tables are printed on. A ``COLUMNS`` or a ``LINES`` that is no such number is passed over."""
    from rich.console import Console

    environment = {name: value for name, value in os.environ.items() if _makes_sense(name, value)}
    return Console(width=width, highlight=highlight, _environ=environment)


def console_for_tables() -> Console:
    """As wide as the terminal; where there is none, as wide as every column needs."""
    return console(width=None if os.isatty(1) else LOG_WIDTH)


def _makes_sense(name: str, value: str) -> bool:
    if name in ("COLUMNS", "LINES"):
        try:
            parse_count(value, TERMINAL)
        except ValueError:
            return False
    return True


def _escaped(letter: str) -> str:
    units = letter.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i : i + 2].hex()}" for i in range(0, len(units), 2))
