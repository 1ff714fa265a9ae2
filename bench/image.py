"""Saving to an image, and coming back from it, beside plain loops in the same run: ``make image``.

Nothing here is asserted: a busy machine makes every figure worse. A plain loop (O_DIRECT writes of 4 MiB, one
after the other, and an fdatasync) runs right before each save that it is compared with.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from pathlib import Path
from time import perf_counter, process_time

import trio
from rich.console import Console
from rich.table import Table

from bench.speed import MIB, dirtier, plain_direct
from kvmmig.migration.incoming import IncomingMigration
from kvmmig.migration.outgoing import OutgoingMigration
from kvmmig.testing.machine import FakeMachine
from kvmmig.units import format_duration, format_rate, format_size


async def live(path: Path, size: int, *, keep: bool) -> tuple[float, float, float]:
    """A guest that rewrites 64 MiB flat out: seconds of the save, of downtime, and bytes written."""
    async with dirtier(size) as machine:
        begin = perf_counter()
        figures = await OutgoingMigration(machine, f"file:{path}", keep_running=keep).run()
        return perf_counter() - begin, figures.downtime or 0.0, figures.sent_bytes


async def mostly_zero(path: Path, size: int) -> tuple[float, float, int]:
    """A guest of ``size`` bytes, 64 MiB of them data: seconds, CPU seconds, and bytes on the disk."""
    machine = FakeMachine(size)
    machine.memory.words[: 64 * MIB // 4096] = 7
    machine.memory.words[64 * MIB // 4096 :, 0] = 0  # a page that was never touched is none
    begin, cpu = perf_counter(), process_time()
    await OutgoingMigration(machine, f"file:{path}", keep_running=True).run()
    took = perf_counter() - begin, process_time() - cpu, os.stat(path).st_blocks * 512
    machine.memory.close()
    return took


async def restored(path: Path, *, prefault: bool) -> tuple[float, float]:
    """Seconds from the request until the guest runs, and until all of it has been read."""
    done = trio.Event()

    def progress(count: int, total: int) -> None:
        if count == total:
            done.set()

    begin = perf_counter()
    incoming = IncomingMigration(f"file:{path}", prefault=prefault, on_prefault=progress)
    async with incoming.machine():
        runs = perf_counter() - begin
        if prefault:
            await done.wait()
        return runs, perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memory", type=int, default=1024, help="MiB of guest memory")
    parser.add_argument("--large", type=int, default=0, help="MiB of a guest that is mostly zero; 0 for none")
    parser.add_argument("--runs", type=int, default=3, help="runs of each; the median counts")
    parser.add_argument("--directory", default="/var/tmp", help="where to write")
    arguments = parser.parse_args()
    size, runs = arguments.memory * MIB, arguments.runs
    table = Table(title=f"images, {format_size(size)} guests, median of {runs} runs")
    for name in ("figure", "measured", "beside"):
        table.add_column(name)
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        path = Path(directory, "guest.img")
        for keep in (False, True):
            name = "live, and it goes on" if keep else "live"
            plain, saves = [], []
            for _ in range(runs):
                plain.append(plain_direct(path, size))
                saves.append(trio.run(lambda keep=keep: live(path, size, keep=keep)))  # type: ignore[misc]
            seconds, downtime, sent = (statistics.median(values) for values in zip(*saves, strict=True))
            rate = statistics.median(plain)
            table.add_row(
                f"{name}: all of it",
                f"{format_duration(seconds)}, {format_size(sent)}",
                f"{format_rate(rate)}",
            )
            table.add_row(
                f"{name}: guest's memory a second",
                format_rate(size / seconds),
                f"{size / seconds / rate:.0%}",
            )
            table.add_row(f"{name}: downtime", format_duration(downtime), "")
        os.sync()
        ways = [trio.run(lambda: restored(path, prefault=False)) for _ in range(runs)]
        table.add_row(
            "restore: until it runs", format_duration(statistics.median(one for one, _ in ways)), ""
        )
        ways = [trio.run(lambda: restored(path, prefault=True)) for _ in range(runs)]
        table.add_row(
            "restore: all of it read", format_duration(statistics.median(two for _, two in ways)), ""
        )
        if arguments.large:
            large = [trio.run(mostly_zero, path, arguments.large * MIB) for _ in range(runs)]
            seconds, cpu, stored = (statistics.median(values) for values in zip(*large, strict=True))
            pages = arguments.large * MIB // 4096
            table.add_row(
                f"{format_size(arguments.large * MIB)}, 64 MiB of it not zero",
                f"{format_duration(seconds)}, {format_duration(cpu)} of CPU",
                f"{pages / seconds / 1e6:.1f} million pages a second",
            )
            table.add_row("its image on the disk", format_size(stored), format_size(64 * MIB))
    Console().print(table)


if __name__ == "__main__":
    main()
