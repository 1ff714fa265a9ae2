"""What is still wrong in lab 2, and why."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import ModuleType

import trio

import kvmmig
from kvmmig.errors import WrongState
from kvmmig.machine.dirty import DirtyTracker
from kvmmig.machine.pageset import PageSet

NEEDS_KVM = True

_HOT = 2 << 20
_HOT_PAGES = _HOT // 4096
#: The guest counts its rounds and keeps its state in a few pages more.
_SLACK = 64


class _Watched(DirtyTracker):
    """A tracker that notes where it is called."""

    def __init__(self, below: DirtyTracker) -> None:
        self._below = below
        self.started = self.stopped = self.collects = 0
        self.on_the_loop = False

    def start(self) -> None:
        self._note()
        self.started += 1
        self._below.start()

    def collect(self, into: PageSet) -> int:
        self._note()
        self.collects += 1
        return self._below.collect(into)

    def stop(self) -> None:
        self._note()
        self.stopped += 1
        self._below.stop()

    def _note(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self.on_the_loop = True


def check(student: ModuleType) -> Iterator[str]:
    """Sentences; none where all is right."""
    yield from trio.run(_check, student)


async def _check(student: ModuleType) -> list[str]:
    settings = {"hot": _HOT}
    async with kvmmig.open_machine("dirtier", memory="16MiB", settings=settings) as machine:
        await machine.start()
        await trio.sleep(0.3)
        watched = _Watched(machine.dirty_tracker())
        machine.dirty_tracker = lambda: watched  # type: ignore[method-assign]  # the student gets this one
        with trio.move_on_after(20) as scope:
            found = await student.watch(machine, 3, 0.2)
        if scope.cancelled_caught:
            return ["watch(machine, 3, 0.2) had not returned after 20 s; it is to look three times"]
        wrong = _wrong(found, watched, machine.memory.n_pages)
        with trio.move_on_after(0.05):
            await student.watch(machine, 1000, 0.02)
        if watched.stopped < watched.started:
            wrong.append(
                "a cancel leaves the dirty log on, and the guest slow: stop it in a finally, shielded"
            )
            watched.stop()
        return wrong


def _wrong(found: list[list[int]], watched: _Watched, n_pages: int) -> list[str]:
    wrong = []
    if not watched.started:
        return ["the tracker was never started, so no page was found"]
    if len(found) != 3:
        return [f"three looks were asked for, and {len(found)} came back: the first collect is none of them"]
    if len(found[0]) == n_pages:
        wrong.append("the first look has all pages of the guest: collect once before the first look")
    sizes = [len(pages) for pages in found]
    if any(size > _HOT_PAGES + _SLACK for size in sizes[1:]):
        wrong.append(
            f"the guest writes {_HOT_PAGES} pages again and again, and your looks have {sizes}: is the set "
            "emptied before each collect?"
        )
    if not any(sizes):
        wrong.append("no look has a page, and the guest writes all the time")
    if watched.on_the_loop:
        wrong.append("the tracker is called on the event loop, which stands still for so long: use a thread")
    try:
        watched._below.start()
    except WrongState:
        wrong.append("the tracker was not stopped at the end, so the guest's pages stay protected")
    finally:
        watched._below.stop()
    return wrong
