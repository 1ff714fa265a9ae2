"""A policy of one's own: wait for a calm moment of the guest, but not for ever.

    python examples/own_policy.py

A policy sees the figures of a round and decides what comes next; it needs to know nothing else.
"""

from __future__ import annotations

import tempfile

import trio

import kvmmig
from kvmmig import Continue, Decision, Policy, RoundFigures, Stop, TransportURI, transport_for


class CalmMoment(Policy):
    """Stop when a round dirties less than half of what the busiest one did, or at the tenth round."""

    busiest = 0.0

    def decide(self, figures: RoundFigures) -> Decision:
        self.busiest = max(self.busiest, figures.dirty_rate)
        calm = figures.dirty_rate < self.busiest / 2
        return Stop() if calm or figures.round >= 9 else Continue()


async def main() -> None:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        image = transport_for(TransportURI("file", f"{directory}/guest.img"))
        async with kvmmig.open_machine("dirtier", memory="64MiB", settings={"hot": "4MiB"}) as machine:
            await machine.start()
            await trio.sleep(0.5)  # it fills its memory
            figures = await kvmmig.migrate(machine, image, policy=CalmMoment())
    for one in figures.rounds:
        print(f"round {one.round}: dirtied {one.dirty_pages} pages, {one.dirty_rate / 1e6:.0f} MB/s")
    print("stopped: expected a downtime of", f"{(figures.expected_downtime or 0) * 1000:.1f} ms,", end=" ")
    print(f"it was {(figures.downtime or 0) * 1000:.1f} ms")


if __name__ == "__main__":
    trio.run(main)
