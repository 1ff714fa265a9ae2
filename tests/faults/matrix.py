"""The matrix: transports, faults, moments, and what a cell of it says."""

from __future__ import annotations

import enum
from dataclasses import dataclass

TRANSPORTS = ("tcp", "unix", "pipe", "file", "exec")


class Fault(enum.StrEnum):
    """What goes wrong on the way to the other side, or there."""

    LINK_CUT = "link cut"
    PEER_KILLED = "peer killed"
    PEER_STOPPED = "peer stopped"
    HELPER_KILLED = "helper killed"
    HELPER_STOPPED = "helper stopped"
    DISK_FULL = "disk full"
    WRITE_ERROR = "write error"
    NOT_WRITABLE = "target not writable"
    FROZEN = "frozen file system"
    SLOW_SINK = "sink at 1 MB/s"
    SLOW_START = "slow start"


#: These end no migration; what must hold is that the loop keeps turning and that a cancel is quick.
SLOW = frozenset({Fault.SLOW_SINK, Fault.SLOW_START})
#: These strike another kvmmig, which would start the guest.
OF_A_PEER = frozenset({Fault.PEER_KILLED, Fault.PEER_STOPPED})


class Moment(enum.StrEnum):
    """Where the migration is when the fault strikes.

    What only stores the guest is never handed over: it has the guest when all is done.
    """

    CONNECT = "connect"
    HELLO = "hello"
    FIRST = "first round"
    LATER = "later round"
    FINAL = "final pass"
    COMMIT = "commit"
    HANDED_OVER = "handed over"


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of the matrix."""

    transport: str
    fault: Fault
    moment: Moment

    def __str__(self) -> str:
        return f"{self.transport}, {self.fault}, {self.moment}"


class Verdict(enum.StrEnum):
    """What came of a cell."""

    GREEN = "green"
    RED = "red"
    IMPOSSIBLE = "impossible"  # no such thing can happen there
    UNAVAILABLE = "unavailable"  # it could, with rights or devices that this host does not give


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A cell's verdict and figures; times in seconds, None where there was nothing to measure."""

    transport: str
    fault: str
    moment: str
    verdict: Verdict
    reason: str = ""  # why there is nothing to see, for the last two verdicts
    problems: tuple[str, ...] = ()  # what makes it red
    error: str = ""  # the sentence that the user reads
    noticed: float | None = None  # from the strike to that sentence
    cancelled: float | None = None  # from a cancel while the fault lasted to the guest's return
    worst_turn: float | None = None  # of the event loop, in all runs of this cell
    taken_back: bool = False  # "go" had been offered: the guest stood still until the operator took it back
