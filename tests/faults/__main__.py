"""``python -m tests.faults``: every fault, on every transport, at every moment of a migration, for real.

Exit status 1 when a cell is red. Without root, or a loop device, cells say what they would need.
"""

from __future__ import annotations

import argparse
import logging
import sys
from contextlib import AsyncExitStack

import msgspec

from kvmmig.cli.lifetime import run_to_end
from kvmmig.machine import State
from tests.faults.host import Host
from tests.faults.matrix import TRANSPORTS, Cell, Fault, Moment, Outcome, Verdict
from tests.faults.misbehaving import Misbehaviour, Point
from tests.faults.misbehaviour_cells import MisbehaviourCell, judge_misbehaviour, misbehaviour_cells
from tests.faults.report import Report
from tests.faults.run_cell import judge
from tests.faults.source import Source

AnyCell = Cell | MisbehaviourCell
_ROGUE = "rogue"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--only", action="append", choices=(*TRANSPORTS, _ROGUE), help="this transport")
    parser.add_argument("--fault", action="append", choices=[*Fault, *Misbehaviour], help="this fault")
    parser.add_argument("--phase", action="append", choices=[*Moment, *Point], help="this moment")
    parser.add_argument("--json", action="store_true", help="one JSON object a cell, on a line")
    chosen = parser.parse_args()
    logging.getLogger("kvmmig.transport").setLevel(logging.CRITICAL)  # tracebacks of what is done on purpose

    def wanted(cell: AnyCell) -> bool:
        transport = cell.transport if isinstance(cell, Cell) else _ROGUE
        return (
            transport in (chosen.only or (transport,))
            and cell.fault in (chosen.fault or (cell.fault,))
            and cell.moment in (chosen.phase or (cell.moment,))
        )

    cells: list[AnyCell] = [
        Cell(transport, fault, moment) for transport in TRANSPORTS for fault in Fault for moment in Moment
    ]
    cells += misbehaviour_cells()
    with Host.explored() as host:
        return run_to_end(lambda: run(host, list(filter(wanted, cells)), chosen.json))


async def _outcome(cell: AnyCell, host: Host, source: Source) -> Outcome:
    if isinstance(cell, Cell):
        return await judge(cell, host, source)
    return await judge_misbehaviour(cell, source)


async def run(host: Host, cells: list[AnyCell], as_json: bool) -> int:
    """Run the cells one after the other; returns the exit status."""
    report = None if as_json else Report()
    red = 0
    async with AsyncExitStack() as stack:
        source = await stack.enter_async_context(Source.running())
        for cell in cells:
            if report:
                report.begin(cell)
            outcome = await _outcome(cell, host, source)
            red += outcome.verdict is Verdict.RED
            if report:
                report.add(outcome)
            else:
                print(msgspec.json.encode(outcome).decode(), flush=True)
            if source.machine.state is not State.RUNNING:  # red: this guest was lost
                await stack.aclose()
                source = await stack.enter_async_context(Source.running())
    if report:
        report.finish()
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
