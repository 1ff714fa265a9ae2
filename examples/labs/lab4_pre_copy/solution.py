"""Lab 4, one solution: the limit, or three rounds in a row that left no less than the best one."""

from __future__ import annotations

import sys

import trio

import kvmmig
from kvmmig import Continue, Decision, Policy, RoundFigures, Stop


class OwnRule(Policy):
    """Stops the guest when that is best."""

    def __init__(self, limit: float) -> None:
        """``limit`` is the downtime that is wanted, in seconds."""
        self.limit = limit
        self._best = float("inf")
        self._idle = 0

    def decide(self, figures: RoundFigures) -> Decision:
        if figures.expected_downtime <= self.limit:
            return Stop()
        self._idle = 0 if figures.dirty_pages < self._best else self._idle + 1
        self._best = min(self._best, figures.dirty_pages)
        return Stop() if self._idle >= 3 else Continue()


async def main(record: str | None) -> None:
    async with kvmmig.open_machine("dirtier", memory="64MiB", settings={"hot": "16MiB"}) as machine:
        await machine.start()
        await trio.sleep(0.5)
        limits = kvmmig.Limits(bandwidth=100e6, timeout=20, on_timeout="force")
        figures = await kvmmig.migrate(
            machine, "exec:cat > /dev/null", policy=OwnRule(0.05), limits=limits, record=record
        )
    print(f"{len(figures.rounds)} rounds, {figures.total_time:.2f} s in all, ", end="")
    print(f"a downtime of {(figures.downtime or 0) * 1e3:.0f} ms")


if __name__ == "__main__":
    trio.run(main, sys.argv[2] if sys.argv[1:2] == ["--record"] else None)
