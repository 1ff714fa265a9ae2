"""How fast does the guest write? ``calc-dirty-rate``: its dirty log, or a sample of its pages, says so."""

from __future__ import annotations

import logging
import time
from typing import Literal, TypeAlias

import trio

from kvmmig.errors import KvmmigError, WrongState
from kvmmig.machine import PAGE_SIZE, Machine
from kvmmig.machine.dirty import DirtyTracker
from kvmmig.machine.pageset import PageSet
from kvmmig.monitor.life import Life
from kvmmig.monitor.page_sampling import PageSample

DirtyRateStatus: TypeAlias = Literal["unstarted", "measuring", "measured"]
#: By the dirty log, exactly, or by a sample of the pages.
DirtyRateMode: TypeAlias = Literal["dirty-bitmap", "page-sampling"]
_log = logging.getLogger(__name__)


class DirtyRate:
    """One measurement at a time, and the last one's result. See `MachineControl.dirty_rate`.

    Pages that were written, however often, divided by the time: a page that is written twice counts once.
    """

    def __init__(self, life: Life, nursery: trio.Nursery) -> None:
        """Use `MachineControl.dirty_rate`."""
        self.status: DirtyRateStatus = "unstarted"
        #: Seconds, as it was asked for.
        self.calc_time = 0.0
        #: How it was measured.
        self.mode: DirtyRateMode = "page-sampling"
        #: Of each GiB; 0 where none were sampled.
        self.sample_pages = 0
        #: When it began, in seconds since the host's boot.
        self.start_time = 0.0
        #: Bytes a second, once it is measured.
        self.rate: float | None = None
        self._life = life
        self._nursery = nursery
        # Its own: a migration waits for `end`, and others may have lost their threads to a dead disk.
        self._limiter = trio.CapacityLimiter(1)
        self._scope = trio.CancelScope()
        self._idle = trio.Event()
        self._idle.set()

    def begin(self, seconds: float, *, sample_pages: int = 0) -> None:
        """Begin to measure, in the background. A migration or a reset that begins meanwhile ends it.

        With ``sample_pages`` so many of each GiB are looked at; without, the dirty log tells of all.
        Raises `WrongState` while another measurement, or a migration, is running.
        """
        machine = self._life.guest("measure")
        if self.status == "measuring":
            raise WrongState("the dirty rate is already being measured. Wait until query-dirty-rate has it")
        self.status = "measuring"
        self.calc_time = seconds
        self.mode = "page-sampling" if sample_pages else "dirty-bitmap"
        self.sample_pages = sample_pages
        self.start_time = time.clock_gettime(time.CLOCK_BOOTTIME)
        self.rate = None
        self._scope = trio.CancelScope()
        self._idle = trio.Event()
        self._nursery.start_soon(self._run, machine)

    async def end(self) -> None:
        """Give a measurement up, and wait until the dirty log is off: it belongs to one at a time."""
        self._scope.cancel()
        await self._idle.wait()

    async def _run(self, machine: Machine) -> None:
        """After a cancel, and after `end`, the dirty log is off and there is no result."""
        try:
            with self._scope:
                self.rate = await (self._sample if self.sample_pages else self._measure)(machine)
        except KvmmigError as error:
            _log.warning("the dirty rate can't be measured: %s", error)
        finally:
            self.status = "unstarted" if self.rate is None else "measured"
            self._idle.set()

    async def _measure(self, machine: Machine) -> float:
        tracker = machine.dirty_tracker()
        pages = PageSet(machine.memory.n_pages)
        try:
            # The first one finds all pages, and begins.
            await trio.to_thread.run_sync(_start, tracker, pages, limiter=self._limiter)
            begin = trio.current_time()
            await trio.sleep(self.calc_time)
            pages.clear()
            written = await trio.to_thread.run_sync(tracker.collect, pages, limiter=self._limiter)
            return written * PAGE_SIZE / (trio.current_time() - begin)
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(tracker.stop, limiter=self._limiter)

    async def _sample(self, machine: Machine) -> float:
        sample = await trio.to_thread.run_sync(
            PageSample, machine.memory, self.sample_pages, limiter=self._limiter
        )
        begin = trio.current_time()
        await trio.sleep(self.calc_time)
        written = await trio.to_thread.run_sync(sample.written, limiter=self._limiter)
        return written / (trio.current_time() - begin)


def _start(tracker: DirtyTracker, pages: PageSet) -> None:
    tracker.start()
    tracker.collect(pages)
