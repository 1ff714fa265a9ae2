"""A migration's life, as a table. `OutgoingMigration` runs on it, and `docs/architecture.md` draws it.

"go" is the point of no return: the moment that it is offered to a channel that does not only store, the guest
belongs to the other side, whatever the channel then says. Before that, any fault leaves it at the source.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass


class Phase(enum.StrEnum):
    """Where a migration is. The last four are its ends."""

    SETUP = "setup"
    ROUNDS = "rounds"
    PRE_SWITCHOVER = "pre-switchover"
    STOP = "stop"
    FINAL = "final"
    COMMIT = "commit"
    HANDED_OVER = "handed-over"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class PhaseRow:
    """What holds in one phase."""

    what: str  # what is done in it
    guest: str  # who has the guest, and what it does
    on_cancel: Phase | None  # what a cancel leads to; None: it is refused
    on_error: Phase | None  # what an error leads to
    following: tuple[Phase, ...]  # what comes next when all goes well

    @property
    def is_end(self) -> bool:
        """There is nothing after it."""
        return not self.following


_RUNS = "the source's, running if it ran"
_PAUSED = "the source's, paused"
_BACK = "the source's, as it was before"

PHASES: Mapping[Phase, PhaseRow] = {
    Phase.SETUP: PhaseRow(
        "connect, hello: does the guest fit there?", _RUNS, Phase.CANCELLED, Phase.FAILED, (Phase.ROUNDS,)
    ),
    Phase.ROUNDS: PhaseRow(
        "memory, in steps, while it is being written",
        _RUNS,
        Phase.CANCELLED,
        Phase.FAILED,
        (Phase.STOP, Phase.PRE_SWITCHOVER),
    ),
    Phase.PRE_SWITCHOVER: PhaseRow(
        "wait to be told to proceed, if that was asked for",
        _PAUSED,
        Phase.CANCELLED,
        Phase.FAILED,
        (Phase.STOP,),
    ),
    Phase.STOP: PhaseRow(
        "vCPUs parked, state captured, last dirty log",
        _PAUSED,
        Phase.CANCELLED,
        Phase.FAILED,
        (Phase.FINAL,),
    ),
    Phase.FINAL: PhaseRow(
        "the last pages, the machine's state, the end",
        _PAUSED,
        Phase.CANCELLED,
        Phase.FAILED,
        (Phase.COMMIT,),
    ),
    Phase.COMMIT: PhaseRow(
        "two-way: wait for ready; one-way: flush; stored: go, flush, close",
        _PAUSED,
        Phase.CANCELLED,
        Phase.FAILED,
        (Phase.HANDED_OVER, Phase.DONE),
    ),
    Phase.HANDED_OVER: PhaseRow(
        "go was offered; two-way: wait for running; one-way: flush, close",
        "the destination's, or on its way",
        None,
        Phase.UNKNOWN,
        (Phase.DONE,),
    ),
    Phase.DONE: PhaseRow("", "the destination's; the source's, where it was only saved", None, None, ()),
    Phase.FAILED: PhaseRow("", _BACK, Phase.FAILED, None, ()),
    Phase.CANCELLED: PhaseRow("", _BACK, Phase.CANCELLED, None, ()),
    Phase.UNKNOWN: PhaseRow("", "the source's, paused, until an operator has looked there", None, None, ()),
}


def may_follow(phase: Phase, following: Phase) -> bool:
    """Whether the table has a way from one phase to the other."""
    row = PHASES[phase]
    return following in (*row.following, row.on_cancel, row.on_error)
