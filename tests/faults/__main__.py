"""``python -m tests.faults``: every fault, on every transport, at every moment of a migration, for real.

Exit status 1 when a cell is red. Without root, or a loop device, cells say what they would need.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from contextlib import AsyncExitStack

import msgspec
import trio

from kvmmig.cli.lifetime import run_to_end
from kvmmig.machine import State
from tests.faults.host import Host
from tests.faults.matrix import TRANSPORTS, Cell, Fault, Moment, Outcome, Verdict
from tests.faults.misbehaving import Misbehaviour, Point
from tests.faults.misbehaviour_cells import MisbehaviourCell, judge_misbehaviour, misbehaviour_cells
from tests.faults.report import Report
from tests.faults.run_cell import judge
from tests.faults.source import Source

_ROGUE = "rogue"
_AT_ONCE = 3  # of the cells that are more waiting than work


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--only", action="append", choices=(*TRANSPORTS, _ROGUE), help="this transport")
    parser.add_argument("--fault", action="append", choices=[*Fault, *Misbehaviour], help="this fault")
    parser.add_argument("--phase", action="append", choices=[*Moment, *Point], help="this moment")
    parser.add_argument("--json", action="store_true", help="one JSON object a cell, on a line")
    chosen = parser.parse_args()
    logging.getLogger("kvmmig").setLevel(logging.CRITICAL)  # what is done on purpose

    def wanted(cell: Cell | MisbehaviourCell) -> bool:
        transport = cell.transport if isinstance(cell, Cell) else _ROGUE
        return (
            transport in (chosen.only or (transport,))
            and cell.fault in (chosen.fault or (cell.fault,))
            and cell.moment in (chosen.phase or (cell.moment,))
        )

    cells = [
        Cell(transport, fault, moment) for transport in TRANSPORTS for fault in Fault for moment in Moment
    ]
    chosen_cells, chosen_rogues = list(filter(wanted, cells)), list(filter(wanted, misbehaviour_cells()))
    with Host.explored() as host:
        return run_to_end(lambda: run(host, chosen_cells, chosen_rogues, chosen.json))


async def run(host: Host, cells: list[Cell], rogues: list[MisbehaviourCell], as_json: bool) -> int:
    """Run the cells one after the other, then the rogues'; returns the exit status."""
    report = None if as_json else Report()
    red = 0

    def tell(outcome: Outcome) -> None:
        nonlocal red
        red += outcome.verdict is Verdict.RED
        if report:
            report.add(outcome)
        else:
            print(msgspec.json.encode(outcome).decode(), flush=True)

    async with AsyncExitStack() as stack:
        source = await stack.enter_async_context(Source.running())
        for cell in cells:
            if report:
                report.begin(str(cell))
            tell(await judge(cell, host, source))
            if source.machine.state is not State.RUNNING:  # red: this guest was lost
                await stack.aclose()
                source = await stack.enter_async_context(Source.running())
    if report:
        report.begin("transports that break the contract")
    await _misbehaviours(rogues, tell)
    if report:
        report.finish()
    return 1 if red else 0


async def _misbehaviours(cells: list[MisbehaviourCell], tell: Callable[[Outcome], None]) -> None:
    """Judge some at a time, for most of them wait; tell of them in order."""
    outcomes: dict[int, Outcome] = {}
    numbered = iter(enumerate(cells))
    told = 0

    async def work() -> None:
        nonlocal told
        async with AsyncExitStack() as stack:
            source = await stack.enter_async_context(Source.running())
            for number, cell in numbered:
                outcomes[number] = await judge_misbehaviour(cell, source)
                while told in outcomes:
                    tell(outcomes[told])
                    told += 1
                if source.machine.state is not State.RUNNING:  # red: this guest was lost
                    await stack.aclose()
                    source = await stack.enter_async_context(Source.running())

    async with trio.open_nursery() as nursery:
        for _ in range(_AT_ONCE):
            nursery.start_soon(work)


if __name__ == "__main__":
    sys.exit(main())
