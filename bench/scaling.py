"""What a migration costs for each GiB of a guest, idle or not: ``.venv/bin/python -m bench.scaling``.

``docs/scaling.md`` multiplies these for a guest that no machine here can hold. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from time import perf_counter

import numpy as np
import trio
from rich.console import Console
from rich.table import Table

from kvmmig.machine import Entry, Machine, MachineConfig, Program
from kvmmig.machine.pageset import PageSet
from kvmmig.units import format_duration, parse_size

_GIB = 1 << 30
_REPEATS = 5


def _seconds(call: Callable[[], object]) -> float:
    begin = perf_counter()
    call()
    return perf_counter() - begin


async def measure(size: int) -> dict[str, float]:
    """Seconds for each part, of a guest of ``size`` bytes that spins and writes nothing."""
    async with Machine.open(MachineConfig(memory=size)) as machine:
        await machine.load(Program("spinner", Entry.LONG64, b"\xeb\xfe"))
        machine.memory.words[:, 0] = 0  # all of it is there
        await machine.start()
        tracker, pending = machine.dirty_tracker(), PageSet(machine.memory.n_pages)
        found = {"dirty logging begins": _seconds(tracker.start)}
        found["the dirty log, all pages dirty"] = _seconds(lambda: tracker.collect(pending))
        found["the dirty log, none dirty"] = statistics.median(
            _seconds(lambda: tracker.collect(PageSet(machine.memory.n_pages))) for _ in range(_REPEATS)
        )
        found["all pending pages as batches"] = _seconds(lambda: sum(1 for _ in pending.batches(4096, 1024)))
        found["looking for zeros, all pages zero"] = _seconds(
            lambda: [machine.memory.are_zero(batch.pages) for batch in pending.batches(4096, 1024)]
        )
        machine.memory.words[:, 0] = 1
        found["looking for zeros, no page zero"] = _seconds(
            lambda: [machine.memory.are_zero(batch.pages) for batch in pending.batches(4096, 1024)]
        )
        tracker.stop()
        found["bytes of one bitmap"] = float(np.asarray(pending.words).nbytes)
        return found


def main() -> None:
    """Print a table: one column a size, and one for 1 TiB, by multiplication."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", default="1GiB,4GiB")
    sizes = [parse_size(size) for size in parser.parse_args().sizes.split(",")]
    columns = [trio.run(measure, size) for size in sizes]
    table = Table("", *(f"{size / _GIB:g} GiB" for size in sizes), "a GiB", "1 TiB, multiplied")
    for name in columns[0]:
        values = [column[name] for column in columns]
        each = values[-1] / (sizes[-1] / _GIB)
        if name.startswith("bytes"):
            table.add_row(name, *(f"{value / 1024:.0f} KiB" for value in (*values, each, each * 1024)))
        else:
            table.add_row(name, *(format_duration(value) for value in (*values, each, each * 1024)))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
