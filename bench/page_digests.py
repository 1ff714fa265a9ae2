"""What ``page-digests`` cost on a link: ``.venv/bin/python bench/page_digests.py``.

A guest that stands still moves over loopback TCP to another process, in turns without digests and with them.
Printed are both rates of its first round, which sends all of its memory, and the median of the pairs' ratios.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
from functools import partial
from multiprocessing.connection import Connection

import numpy as np
import trio

from kvmmig import guests
from kvmmig.machine import Machine, MachineConfig
from kvmmig.migration.incoming import IncomingMigration
from kvmmig.migration.outgoing import OutgoingMigration
from kvmmig.migration.policy import Limits, MaxRounds
from kvmmig.units import format_rate, parse_size


async def receive(pipe: Connection, count: int) -> None:
    """Take in so many guests, one after the other."""
    for _ in range(count):
        incoming = IncomingMigration("tcp:127.0.0.1:0", on_listening=lambda uri: pipe.send(str(uri)))
        async with incoming.machine():
            pass


async def send(uri: str, size: int, *, digests: bool) -> float:
    """Move one guest; returns bytes a second of its first round."""
    program = guests.find("dirtier").program(memory=size, cpus=1, settings={})
    config = MachineConfig(memory=size, name=program.name, parameters=program.parameters)
    async with Machine.open(config) as machine:
        await machine.load(program)
        await machine.start()
        await machine.pause()
        machine.memory.words[1024:] = np.random.default_rng(1).integers(1, 1 << 62, (1, 512), np.uint64)
        limits = Limits(page_digests=digests)
        figures = await OutgoingMigration(machine, uri, policy=MaxRounds(1), limits=limits).run()
        return figures.rounds[0].rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memory", type=parse_size, default=512 << 20)
    parser.add_argument("--pairs", type=int, default=7)
    options = parser.parse_args()
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=trio.run, args=(receive, theirs, 2 * options.pairs)
    )
    process.start()
    rates: dict[bool, list[float]] = {False: [], True: []}
    for pair in range(options.pairs):
        for digests in (False, True) if pair % 2 else (True, False):
            rates[digests].append(trio.run(partial(send, ours.recv(), options.memory, digests=digests)))
    process.join()
    ratio = statistics.median(b / a for a, b in zip(rates[False], rates[True], strict=True))
    for digests, name in ((False, "without"), (True, "with")):
        print(f"{name:<8} {format_rate(statistics.median(rates[digests]))}")
    print(f"ratio    {ratio:.2f}")


if __name__ == "__main__":
    main()
