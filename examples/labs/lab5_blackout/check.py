"""What is still wrong in lab 5, and why: the steps are called with saves that are made up."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from time import perf_counter, sleep
from types import ModuleType

import trio

NEEDS_KVM = False

#: Seconds after which a step that is to end by itself is ended.
_ENDLESS = 1.0


class _Endless(Exception):
    pass


class _Sink:
    """A save with so many writes; the write with number ``full`` says EAGAIN."""

    def __init__(self, writes: float, full: int = -1) -> None:
        self.left = writes
        self.full = full
        self.written = 0
        self._begin = perf_counter()

    def more(self) -> bool:
        return self.left > 0

    def write(self) -> bool:
        if perf_counter() - self._begin > _ENDLESS:
            raise _Endless
        if self.written == self.full:
            return False
        sleep(0.0001)
        self.written += 1
        self.left -= 1
        return True


def check(student: ModuleType) -> Iterator[str]:
    """Sentences; none where all is right."""
    yield from _check_bound(student)
    yield from trio.run(_check_thread, student)


def _check_bound(student: ModuleType) -> Iterator[str]:
    began = perf_counter()
    try:
        outcome = student.bounded_step(_Sink(float("inf")))
    except _Endless:
        yield (
            f"a sink took all that was written, and your bounded step had not ended after {_ENDLESS:g} s: "
            "neither EAGAIN nor the round's end comes there, so look at the clock after each write"
        )
        return
    taken = perf_counter() - began
    if outcome != "late":
        yield f"a step that ends by the clock is 'late', and yours says {outcome!r}"
    if taken < 0.9 * student.BOUND:
        yield f"your bounded step ended after {taken * 1e3:.1f} ms; it may take {student.BOUND * 1e3:g} ms"
    sink = _Sink(float("inf"), full=3)
    if (outcome := student.bounded_step(sink)) != "full" or sink.written != 3:
        yield (
            f"on EAGAIN at the fourth write a step is 'full', and yours wrote {sink.written} times "
            f"and says {outcome!r}"
        )
    sink = _Sink(3)
    if (outcome := student.bounded_step(sink)) != "done" or sink.written != 3:
        yield (
            f"after a round of three writes a step is 'done', and your bounded step made {sink.written} "
            f"and says {outcome!r}"
        )


async def _check_thread(student: ModuleType) -> list[str]:
    wrong: list[str] = []
    reading, writing = os.pipe2(os.O_NONBLOCK)
    calls: list[bool] = []
    drained = False

    class Save:
        fd = writing

    def step(save: object) -> str:
        calls.append(threading.current_thread() is threading.main_thread())
        if len(calls) > 1 and not drained and not wrong:
            wrong.append(
                "after 'full' your send_in_thread calls the step again while the pipe is full: wait_writable"
            )
        sleep(0.02)
        if drained or len(calls) > 5:
            return "done"
        try:
            while True:
                os.write(writing, bytes(4096))
        except BlockingIOError:
            return "full"

    async with trio.open_nursery() as nursery:

        async def drain() -> None:
            nonlocal drained
            await trio.sleep(0.1)
            drained = True
            os.read(reading, 1 << 16)

        nursery.start_soon(drain)
        with trio.move_on_after(5) as scope:
            await student.send_in_thread(Save(), step)
    os.close(reading)
    os.close(writing)
    if scope.cancelled_caught:
        wrong.append("your send_in_thread had not returned 5 s after the pipe was empty again")
    if any(calls):
        wrong.append("your send_in_thread calls the step on the event loop's thread: trio.to_thread.run_sync")
    if not calls:
        wrong.append("your send_in_thread never calls the step")
    return wrong
