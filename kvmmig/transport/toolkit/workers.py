"""Threads for calls that may hang for as long as a disk pleases, without holding up a cancel.

``trio.to_thread`` alone is not enough: a call that was abandoned would leave behind what it opens, and a
channel that writes for minutes wants its own few threads rather than a share of everybody's.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable
from typing import TypeVar

import trio

T = TypeVar("T")


async def open_in_thread(make: Callable[[], T], drop: Callable[[T], None]) -> T:
    """Return ``make()``, called in a thread. A cancel takes effect at once.

    What ``make`` has returned by then, or returns later, goes to ``drop``, in a thread too.
    """
    lock = threading.Lock()
    made: list[T] = []
    abandoned = False

    def work() -> None:
        thing = make()
        with lock:
            if not abandoned:
                made.append(thing)
                return
        drop(thing)

    try:
        await trio.to_thread.run_sync(work, abandon_on_cancel=True, limiter=trio.CapacityLimiter(1))
    except trio.Cancelled:
        with lock:
            abandoned = True
        if made:
            threading.Thread(target=drop, args=made, daemon=True).start()
        raise
    return made[0]


def attempt(call: Callable[[], object], name: str) -> None:
    """Have ``call`` called in a thread, and wait for it no longer than a few milliseconds. Never raises.

    For what takes microseconds except where a disk hangs, such as removing a name. A program that ends right
    after this would take the thread with it, hence the milliseconds.
    """
    thread = threading.Thread(target=call, name=name, daemon=True)
    thread.start()
    thread.join(0.005)


class Workers:
    """A channel's own daemon threads. They take calls in order and report each to the event loop.

    Belongs to the event loop of the task that made it; `submit` and `stop` are called there.
    """

    def __init__(self, name: str, count: int, at_end: Callable[[], None]) -> None:
        """``at_end`` is called once, by the last thread to end: the place to close what the calls use."""
        self._calls: queue.SimpleQueue[tuple[Callable[[], object], Callable[[Exception | None], None]] | None]
        self._calls = queue.SimpleQueue()
        self._token = trio.lowlevel.current_trio_token()
        self._at_end = at_end
        self._lock = threading.Lock()
        self._alive = count
        self._stopped = False
        for number in range(count):
            threading.Thread(target=self._work, name=f"{name} #{number}", daemon=True).start()

    def submit(self, call: Callable[[], object], done: Callable[[Exception | None], None]) -> None:
        """Have a thread call ``call``, then the event loop ``done`` with the error that it raised, if any."""
        self._calls.put((call, done))

    def stop(self) -> None:
        """Let the threads end; waits for none. Calls not yet begun are forgotten. Idempotent."""
        if not self._stopped:
            self._stopped = True
            for _ in range(self._alive):
                self._calls.put(None)

    def _work(self) -> None:
        while (job := self._calls.get()) is not None:
            if self._stopped:
                continue
            call, done = job
            try:
                call()
            except Exception as error:
                failure: Exception | None = error
            else:
                failure = None
            with contextlib.suppress(trio.RunFinishedError):  # abandoned: nobody is left to be told
                self._token.run_sync_soon(done, failure)
            del job, call, done, failure  # while waiting, hold on to nobody's memory
        with self._lock:
            self._alive -= 1
            last = self._alive == 0
        if last:
            self._at_end()
