"""A machine without KVM, for testing what moves machines: memory, a dirty log, a state to capture.

It is what `kvmmig.migration` asks of a machine, and no more. Its guest is whoever calls `write`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import trio

from kvmmig.errors import WrongState
from kvmmig.machine.cpu import Ending
from kvmmig.machine.dirty import DirtyTracker
from kvmmig.machine.memory import MEMORY_UNIT, PAGE_SIZE, GuestMemory
from kvmmig.machine.pageset import PageSet
from kvmmig.machine.state import StateSection
from kvmmig.machine.states import State


class FakeTracker(DirtyTracker):
    """A dirty log in Python: the first `collect` finds all pages, as KVM's "initially set" does."""

    def __init__(self, n_pages: int) -> None:
        self.on = False
        self._log = PageSet(n_pages)

    def start(self) -> None:
        self.on = True
        self._log.fill()

    def record(self, page: int) -> None:
        """The guest wrote this page."""
        if self.on:
            self._log.add(page)

    def collect(self, into: PageSet) -> int:
        count = len(self._log)
        into.update(self._log)
        self._log.clear()
        return count

    def stop(self) -> None:
        self.on = False


class FakeDescription:
    """A description with nothing in it."""

    def encode(self) -> bytes:
        return b'{"fake":true}'


class FakeMachine:
    """Runs from the beginning. ``sections`` is the state that it captures."""

    def __init__(self, size: int = MEMORY_UNIT, *, sections: Sequence[StateSection] = ()) -> None:
        self.memory = GuestMemory(size)
        self.description = FakeDescription()
        self.state = State.RUNNING
        self.sections = sections or [StateSection("cpu0/regs", 1, b"state")]
        self.tracker = FakeTracker(self.memory.n_pages)
        #: It has no vCPUs, so no threads.
        self.thread_ids: Sequence[int] = ()
        self.exits: Mapping[str, int] = {}
        #: Every share that `throttle` was told.
        self.throttled: list[float] = []
        self._ending = trio.Event()
        self._how = Ending("exit")

    def write(self, page: int, value: int) -> None:
        """The guest fills one page with a byte."""
        assert self.state is State.RUNNING, "a guest that is stopped writes nothing"
        self.memory.pages(page)[:] = bytes([value]) * PAGE_SIZE
        self.tracker.record(page)

    def end(self, ending: Ending) -> None:
        """The guest ends by itself."""
        self._how = ending
        self.state = State.ENDED
        self._ending.set()

    def dirty_tracker(self) -> DirtyTracker:
        return self.tracker

    async def pause(self) -> None:
        await trio.lowlevel.checkpoint()
        self.state = State.PAUSED

    async def resume(self) -> None:
        await trio.lowlevel.checkpoint()
        if self.state is not State.PAUSED:
            raise WrongState(f"the guest {self.state}")
        self.state = State.RUNNING

    async def capture(self) -> Sequence[StateSection]:
        await trio.lowlevel.checkpoint()
        assert self.state is State.PAUSED, "only a stopped guest's state means anything"
        return self.sections

    async def forget_capture(self) -> None:
        await trio.lowlevel.checkpoint()

    async def wait(self) -> Ending:
        await self._ending.wait()
        return self._how

    async def throttle(self, share: float) -> None:
        await trio.lowlevel.checkpoint()
        self.throttled.append(share)

    def mark_moved(self) -> None:
        assert self.state is State.PAUSED
        self.state = State.MOVED
