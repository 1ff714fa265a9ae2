"""Slowing a guest down: its vCPUs stand still for a share of the time, in slices of 10 ms."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from kvmmig.machine.cpu import Cpu

#: Seconds. In each slice the vCPUs run for a part and stand still for the rest.
SLICE = 0.010


class Throttle:
    """Holds vCPUs back from a thread of its own, which lives only while there is something to hold back."""

    def __init__(self, cpus: Sequence[Cpu]) -> None:
        self._cpus = cpus
        self._share = 0.0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def set(self, share: float) -> None:
        """Let the vCPUs stand still for ``share`` (0 to 0.99) of the time from now on. Blocks for a slice."""
        if not 0 <= share <= 0.99:
            raise ValueError(f"a vCPU can't stand still for {share:.0%} of the time; use 0 to 0.99")
        self._share = share
        if share and self._thread is None:
            self._stop.clear()
            self._thread = threading.Thread(target=self._main, name="kvmmig throttle", daemon=True)
            self._thread.start()
        elif not share and self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._thread = None

    def _main(self) -> None:
        while not self._stop.wait(SLICE):
            for cpu in self._cpus:
                cpu.hold(self._share * SLICE)
