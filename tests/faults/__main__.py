"""``python -m tests.faults``: every fault, on every transport, at every moment of a migration, for real.

Exit status 1 when a cell is red. Without root, or a loop device, cells say what they would need.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import AsyncExitStack

import msgspec

from kvmmig.cli.lifetime import run_to_end
from kvmmig.machine import State
from tests.faults.host import Host
from tests.faults.matrix import TRANSPORTS, Cell, Fault, Moment, Verdict
from tests.faults.report import Report
from tests.faults.run_cell import judge
from tests.faults.source import Source


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--only", action="append", choices=TRANSPORTS, help="this transport")
    parser.add_argument("--fault", action="append", choices=list(Fault), help="this fault")
    parser.add_argument("--phase", action="append", choices=list(Moment), help="this moment")
    parser.add_argument("--json", action="store_true", help="one JSON object a cell, on a line")
    chosen = parser.parse_args()
    cells = [
        Cell(transport, fault, moment)
        for transport in chosen.only or TRANSPORTS
        for fault in (Fault(name) for name in chosen.fault or Fault)
        for moment in (Moment(name) for name in chosen.phase or Moment)
    ]
    with Host.explored() as host:
        return run_to_end(lambda: run(host, cells, chosen.json))


async def run(host: Host, cells: list[Cell], as_json: bool) -> int:
    """Run the cells one after the other; returns the exit status."""
    report = None if as_json else Report()
    red = 0
    async with AsyncExitStack() as stack:
        source = await stack.enter_async_context(Source.running())
        for cell in cells:
            if report:
                report.begin(cell)
            outcome = await judge(cell, host, source)
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
