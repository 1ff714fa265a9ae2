"""Tables that fit a terminal of any width: columns go, the least important first, and names stay whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvmmig.cli.printing import words

_GAP = 2  # columns between two that no line parts
_LEAST_TEXT = 20  # columns that text needs to be read, where it is folded


@dataclass(frozen=True, slots=True)
class Column:
    """``importance`` 0 is what a row can't do without; the higher the number, the sooner it goes.

    What ``folds`` is text, of which a row may have many lines; everything else stands on one.
    """

    title: str
    importance: int = 0
    right: bool = False
    folds: bool = False


def fitted(
    columns: Sequence[Column],
    rows: Sequence[Sequence[str | Text]],
    console: Console,
    *,
    framed: bool = False,
    spaced: bool = False,
) -> Table:
    """A table of as many ``columns`` as the console has room for; each row has a cell for all of them.

    ``framed`` draws lines around it, where the console's encoding has them. ``spaced`` leaves an empty line
    behind each row. Where not even what can't be missed has room, it is folded.
    """
    cells = [[_text(cell) for cell in row] for row in rows]
    widths = [_width(column, [row[i] for row in cells]) for i, column in enumerate(columns)]
    framed = framed and console.encoding.startswith("utf")
    room = console.width - 1 if framed else console.width + _GAP
    chosen = list(range(len(columns)))

    def fits() -> bool:
        return sum(widths[i] + (3 if framed else _GAP) for i in chosen) <= room

    while not fits() and (least := max(columns[i].importance for i in chosen)):
        # Of two that are equally important, the one on the right goes.
        chosen.remove(max(i for i in chosen if columns[i].importance == least))
    table = _empty(framed, spaced)
    for i in chosen:
        folds = columns[i].folds or not fits()
        table.add_column(
            columns[i].title,
            justify="right" if columns[i].right else "left",
            no_wrap=not folds,
            overflow="fold" if folds else "crop",
        )
    for row in cells:
        table.add_row(*(row[i] for i in chosen))
    return table


def _empty(framed: bool, spaced: bool) -> Table:
    if framed:
        return Table(box=box.HEAVY_HEAD, padding=(0, 1))
    return Table(box=None, pad_edge=False, padding=(0, _GAP, 1 if spaced else 0, 0))


def _text(cell: str | Text) -> Text:
    return words(cell) if isinstance(cell, str) else cell


def _width(column: Column, cells: Sequence[Text]) -> int:
    lines = [column.title, *(line for cell in cells for line in cell.plain.split("\n"))]
    widest = max(map(cell_len, lines))
    return min(widest, _LEAST_TEXT) if column.folds else widest
