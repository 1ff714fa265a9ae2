"""What is still wrong in lab 4, and why: the rule is asked about rounds that are made up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import ModuleType

from kvmmig import RoundFigures, Stop

NEEDS_KVM = False

_RATE = 100e6
_LIMIT = 0.05


def check(student: ModuleType) -> Iterator[str]:
    """Sentences; none where all is right."""
    small = int(_LIMIT * _RATE / 4096)
    if (rounds := _stops(student, [small - 1])) != 1:
        yield (
            f"after round 0 the rest takes {(small - 1) * 4096 / _RATE * 1e3:.1f} ms and the limit is "
            f"{_LIMIT * 1e3:g} ms, and your rule {_what(rounds)}: compare expected_downtime with the limit"
        )
    halving = [small * 2**power for power in range(6, -2, -1)]
    rounds = _stops(student, halving)
    if rounds is not None and rounds < 7:
        yield (
            f"each round leaves half of the one before it, and your rule stops after {rounds} of them, with "
            f"{halving[rounds - 1] * 4096 / _RATE * 1e3:.0f} ms left: go on as long as it gets better"
        )
    elif rounds is None:
        yield "each round leaves half of the one before, below the limit at last, and your rule never stops"
    rounds = _stops(student, [small * 4] * 40)
    if rounds is None or rounds > 6:
        yield (
            f"all rounds leave the same, above the limit, and your rule {_what(rounds)}: more of them bring "
            "nothing, so stop after five at the most"
        )
    uneven = [small * 64, small * 80, small * 32, small * 40, small * 16, small * 4, small // 2]
    rounds = _stops(student, uneven)
    if rounds is not None and rounds < 7:
        yield (
            "one round leaves more than the one before it, the next one less than any, and your rule stops "
            f"after {rounds}: a single bad round proves nothing"
        )


def _stops(student: ModuleType, left: Sequence[int]) -> int | None:
    """After how many rounds it stops that leave so many pages; None where it does not."""
    rule = student.OwnRule(_LIMIT)
    sent = 1 << 15
    for number, pages in enumerate(left):
        duration = sent * 4096 / _RATE
        figures = RoundFigures(
            round=number,
            sent_pages=sent,
            zero_pages=0,
            sent_bytes=sent * 4096,
            duration=duration,
            dirty_pages=pages,
            rate=_RATE,
            dirty_rate=pages * 4096 / duration,
        )
        if isinstance(rule.decide(figures), Stop):
            return number + 1
        sent = pages
    return None


def _what(rounds: int | None) -> str:
    return "goes on" if rounds is None else f"stops only after {rounds} rounds"
