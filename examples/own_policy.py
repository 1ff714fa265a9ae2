"""A policy of one's own: wait for a calm moment of the guest, but not for ever.

    python examples/own_policy.py

A policy sees the figures of a round and decides what comes next; it needs to know nothing else.
"""

from __future__ import annotations

import tempfile

import trio

from kvmmig import Machine, MachineConfig, OutgoingMigration, guests
from kvmmig.migration.policy import Continue, Decision, Policy, RoundFigures, Stop

MEMORY = 64 << 20


class CalmMoment(Policy):
    """Stop when a round dirties less than half of what the busiest one did, or at the tenth round."""

    busiest = 0.0

    def decide(self, figures: RoundFigures) -> Decision:
        self.busiest = max(self.busiest, figures.dirty_rate)
        calm = figures.dirty_rate < self.busiest / 2
        return Stop() if calm or figures.round >= 9 else Continue()


async def main() -> None:
    program = guests.find("dirtier").program(memory=MEMORY, cpus=1, settings={"hot": "4MiB"})
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        async with Machine.open(MachineConfig(memory=MEMORY)) as machine:
            await machine.load(program)
            await machine.start()
            await trio.sleep(0.5)
            migration = OutgoingMigration(machine, f"file:{directory}/guest.img", policy=CalmMoment())
            figures = await migration.run()
    for one in figures.rounds:
        print(f"round {one.round}: dirtied {one.dirty_pages} pages, {one.dirty_rate / 1e6:.0f} MB/s")
    print("stopped: expected a downtime of", f"{(figures.expected_downtime or 0) * 1000:.1f} ms,", end=" ")
    print(f"it was {(figures.downtime or 0) * 1000:.1f} ms")


if __name__ == "__main__":
    trio.run(main)
