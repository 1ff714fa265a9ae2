"""Setup and rate over TCP, on this host as it is and beside busy processes: ``make loaded``.

A paused guest of random bytes goes to another kvmmig process. A plain blocking loop of 1 MiB calls between
two processes, into memory that was touched before, is what this host gives at that moment: each migration has
one right before it, and what is compared is the ratio of the two.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import trio
from rich.console import Console
from rich.table import Table

from bench.speed import MIB, destination, dirtier, plain_tcp
from kvmmig.migration.outgoing import OutgoingMigration
from kvmmig.migration.report import MigrationStatistics
from kvmmig.units import format_duration, format_rate, format_size


@contextmanager
def hogs(count: int) -> Iterator[None]:
    """So many busy shells. None of them outlives this process by more than two minutes."""
    busy = [subprocess.Popen(["timeout", "120", "sh", "-c", "while :; do :; done"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in busy:
            process.terminate()
            process.wait()


async def migrated(size: int, count: int) -> MigrationStatistics:
    """Its figures. Guest and destination are there before the busy processes are."""
    async with dirtier(size) as machine:
        await machine.pause()
        with destination() as uri, hogs(count):
            return await OutgoingMigration(machine, uri).run()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--memory", type=int, default=512, help="MiB of guest memory")
    parser.add_argument("--runs", type=int, default=3, help="runs of each; the median counts")
    parser.add_argument("--hogs", type=int, default=2 * (os.cpu_count() or 1), help="busy processes")
    arguments = parser.parse_args()
    size = arguments.memory * MIB
    table = Table(title=f"a paused guest of {format_size(size)} over TCP, medians of {arguments.runs} runs")
    for column in ("host", "setup", "total", "rate", "a plain loop", "ratio", "worst turn"):
        table.add_column(column)
    for count in sorted({0, arguments.hogs}):
        plain, figures = [], []
        for _ in range(arguments.runs):
            with hogs(count):
                plain.append(plain_tcp(size))
            figures.append(trio.run(migrated, size, count))
        rates = [one.rounds[0].rate for one in figures]
        ratio = statistics.median(rate / bare for rate, bare in zip(rates, plain, strict=True))
        table.add_row(
            f"{count} hogs" if count else "as it is",
            format_duration(statistics.median(one.setup_time or 0.0 for one in figures)),
            format_duration(statistics.median(one.total_time for one in figures)),
            format_rate(statistics.median(rates)),
            format_rate(statistics.median(plain)),
            f"{ratio:.2f}",
            format_duration(statistics.median(one.worst_stall for one in figures)),
        )
    Console().print(table)


if __name__ == "__main__":
    main()
