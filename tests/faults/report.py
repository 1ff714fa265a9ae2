"""The matrix on a terminal: one table a transport, then what makes cells red, then why some are empty."""

from __future__ import annotations

from collections import defaultdict
from time import perf_counter

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tests.faults.matrix import Outcome, Verdict
from tests.faults.misbehaviour_cells import ENDED
from tests.faults.run_cell import CANCEL, NOTICE, TURN

_MARKS = {
    Verdict.GREEN: ("✓", "green"),
    Verdict.RED: ("✗", "bold red"),
    Verdict.IMPOSSIBLE: ("–", "dim"),
    Verdict.UNAVAILABLE: ("?", "yellow"),
}


_LEGEND = f"""
Each cell, in ms: how long until the fault had become an error (at most {NOTICE * 1e3:.0f}) | how long a
cancel while it lasted took (at most {CANCEL * 1e3:.0f}; none where the error came first) | the event loop's
worst turn (at most {TURN * 1e3:.0f}). ✓ means too: the guest ran on and all of its memory was right, dirty
logging was off, the error named the cause, and no process, thread, file descriptor or partial file was left,
after the thaw at the latest. What is only slow is no error: there the cancel counts. What was late is tried
once more, for the host may be busy. ✓*: "go" had been offered to somebody who may start the guest, so it
stood still here until the operator took it back (and a cancel was refused).

A rogue is a transport that breaks the contract. There the first figure is how long the migration took
from then on (at most {ENDED * 1e3:.0f}), and ✓ means: at no time both sides ran; a guest that was not handed
over ran on at the source, one that had arrived ran on at the destination, with all of its memory right; the
event loop turned; the error named the transport and the rule that it broke.
"""


class Report:
    """Collects outcomes; prints a transport's table when all of its cells are there."""

    def __init__(self) -> None:
        self._console = Console(width=None if Console().is_terminal else 130)
        self._status = self._console.status("")
        self._outcomes: list[Outcome] = []
        self._began = perf_counter()
        self._transport = ""
        self._reasons: dict[str, int] = {}

    def begin(self, what: str) -> None:
        """Say what is being done."""
        self._status.update(what)
        self._status.start()

    def add(self, outcome: Outcome) -> None:
        """The next cell's outcome."""
        if outcome.transport != self._transport:
            self._flush()
            self._transport = outcome.transport
        self._outcomes.append(outcome)

    def finish(self) -> None:
        """Print what is left, the reasons, and a summary."""
        self._flush()
        self._status.stop()
        for reason, number in self._reasons.items():
            self._console.print(f"({number}) {reason}", highlight=False)
        self._console.print(_LEGEND, highlight=False)
        self._console.print(f"{perf_counter() - self._began:.0f} s", highlight=False)

    def _flush(self) -> None:
        outcomes, self._outcomes = self._outcomes, []
        if not outcomes:
            return
        self._status.stop()
        moments = list(dict.fromkeys(one.moment for one in outcomes))
        table = Table("", *moments, title=self._transport, title_justify="left", title_style="bold")
        rows: defaultdict[str, dict[str, Outcome]] = defaultdict(dict)
        for outcome in outcomes:
            rows[outcome.fault][outcome.moment] = outcome
        for fault, row in rows.items():
            table.add_row(fault, *(self._cell(row[moment]) for moment in moments))
        self._console.print(table)
        for outcome in outcomes:
            if outcome.verdict is Verdict.RED:
                self._console.print(f"✗ {outcome.fault}, {outcome.moment}:", style="red", highlight=False)
                for problem in outcome.problems:
                    self._console.print(f"    {problem}", highlight=False, markup=False)

    def _cell(self, outcome: Outcome) -> Text:
        mark, style = _MARKS[outcome.verdict]
        mark += "*" if outcome.taken_back else ""
        if outcome.reason:
            number = self._reasons.setdefault(outcome.reason, len(self._reasons) + 1)
            return Text(f"{mark} ({number})", style)
        figures = (outcome.noticed, outcome.cancelled, outcome.worst_turn)
        texts = ["–" if figure is None else f"{figure * 1e3:.0f}" for figure in figures]
        return Text(f"{mark} {' | '.join(texts)}", style)
