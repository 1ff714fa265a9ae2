"""How fast does the guest write? ``calc-dirty-rate``: its dirty log, read once after some time."""

from __future__ import annotations

import time
from typing import Literal, TypeAlias

import trio

from kvmmig.machine import Machine
from kvmmig.machine.dirty import DirtyTracker
from kvmmig.machine.memory import PAGE_SIZE
from kvmmig.machine.pageset import PageSet

DirtyRateStatus: TypeAlias = Literal["unstarted", "measuring", "measured"]


class DirtyRate:
    """One measurement at a time, and the last one's result.

    Pages that were written, however often, divided by the time: a page that is written twice counts once.
    """

    def __init__(self) -> None:
        self.status: DirtyRateStatus = "unstarted"
        #: Seconds, as it was asked for.
        self.calc_time = 1.0
        #: When it began, in seconds since the host's boot.
        self.start_time = 0.0
        #: Bytes a second, once it is measured.
        self.rate: float | None = None
        self._scope = trio.CancelScope()
        self._idle = trio.Event()
        self._idle.set()

    def begin(self, calc_time: float) -> None:
        """A measurement of so many seconds is to `run`; whoever asks sees it from now on."""
        self.status = "measuring"
        self.calc_time = calc_time
        self.start_time = time.clock_gettime(time.CLOCK_BOOTTIME)
        self.rate = None
        self._scope = trio.CancelScope()
        self._idle = trio.Event()

    async def run(self, machine: Machine) -> None:
        """Measure. After a cancel, and after `end`, the dirty log is off and there is no result.

        Raises `KvmError`.
        """
        try:
            with self._scope:
                self.rate = await self._measure(machine)
        finally:
            self.status = "unstarted" if self.rate is None else "measured"
            self._idle.set()

    async def end(self) -> None:
        """Give a measurement up, and wait until the dirty log is off: it belongs to one at a time."""
        self._scope.cancel()
        await self._idle.wait()

    async def _measure(self, machine: Machine) -> float:
        tracker = machine.dirty_tracker()
        pages = PageSet(machine.memory.n_pages)
        try:
            # The first one finds all pages, and begins.
            await trio.to_thread.run_sync(_start, tracker, pages)
            begin = trio.current_time()
            await trio.sleep(self.calc_time)
            pages.clear()
            written = await trio.to_thread.run_sync(tracker.collect, pages)
            return written * PAGE_SIZE / (trio.current_time() - begin)
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(tracker.stop)


def _start(tracker: DirtyTracker, pages: PageSet) -> None:
    tracker.start()
    tracker.collect(pages)
