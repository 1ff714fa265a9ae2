"""``kvmmig lab knock-out``: what becomes of a guest that lacks a piece of its state."""

from __future__ import annotations

import trio

from kvmmig.cli.printing import echo
from kvmmig.lab.missing_state.comparing import compare, sections


def list_sections() -> int:
    """A line for each section, the first vCPU's for all of theirs."""
    for section, says in sections().items():
        echo(f"{section.replace('cpu/', 'cpu0/'):<20} {says}")
    return 0


def show_without(section: str) -> int:
    """Move the guests that have something there, twice each. Raises `KvmmigError`."""
    for each in trio.run(compare, section):
        echo(f"{each.guest}: {each.says}")
        for how, ending in (("with", each.whole), ("without", each.lacking)):
            first, *more = ending.strip().splitlines()
            echo(f"  {how + ' it:':<12} {first}")
            for line in more:
                echo(f"               {line}")
    return 0
