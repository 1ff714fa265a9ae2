"""What recording costs a migration into a sink that takes all: its rate, and CPU time of this process.

Run with a record between two runs without one, again and again: ``python bench/recording.py [TIMES]``.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from time import process_time

import trio

import kvmmig

_MEMORY = "512MiB"


async def _measure(machine: kvmmig.Machine, record: Path | None) -> tuple[float, float]:
    """Bytes a second of the first round, and bytes for a second of CPU. The guest stays here, for the
    migration is cancelled then."""
    figures: list[kvmmig.RoundFigures] = []

    def stop(figure: kvmmig.RoundFigures) -> None:
        figures.append(figure)
        migration.cancel("it was measured")

    migration = kvmmig.OutgoingMigration(
        machine, "exec:cat > /dev/null", policy=kvmmig.MaxRounds(2), record=record, on_round=stop
    )
    cpu = process_time()
    with suppress(kvmmig.MigrationCancelled):
        await migration.run()
    cpu = process_time() - cpu
    return figures[0].sent_bytes / figures[0].duration, figures[0].sent_bytes / cpu


def _spread(ratios: list[float]) -> str:
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"median {middle:.3f}, quartiles {low:.3f} and {high:.3f}"


async def main(times: int) -> None:
    """Measure, and print."""
    rates: list[float] = []
    cpus: list[float] = []
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "record.jsonl"
        # The guest stands still: it would take CPU time of this very process.
        async with kvmmig.open_machine("dirtier", memory=_MEMORY, settings={"hot": "480MiB"}) as machine:
            await machine.start()
            await _measure(machine, None)  # the guest writes its memory meanwhile
            await machine.pause()
            before = await _measure(machine, None)
            for _ in range(times):
                recorded, after = await _measure(machine, path), await _measure(machine, None)
                # One before and one after: a host drifts.
                rates.append(2 * recorded[0] / (before[0] + after[0]))
                cpus.append(2 * recorded[1] / (before[1] + after[1]))
                before = after
        lines = path.read_bytes().count(b"\n")
    print(f"{times} times, {lines // times} events each; with a record by without:")
    print(f"  bytes a second         {_spread(rates)}")
    print(f"  bytes a second of CPU  {_spread(cpus)}")


if __name__ == "__main__":
    trio.run(main, int(sys.argv[1]) if len(sys.argv) > 1 else 15)
