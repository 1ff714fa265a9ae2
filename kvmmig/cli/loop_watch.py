"""Whether the event loop of a machine's process turns, as a thread outside of it sees it.

A loop that is stuck or broken leaves a guest that runs and that nobody can reach. The thread has the loop
answer, again and again; after `NOTICE` seconds without an answer it says so, after `BOUND` the process is
left.

It counts only time in which the loop could have turned: in short steps, of which each counts for no more than
it was meant to take, however long the host or the process stood still meanwhile; and none in which a debugger
has the process or its main thread.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import trio

from kvmmig.cli.forced_exit import ForcedExit

#: Seconds without a turn of the loop. What kvmmig itself does in it takes milliseconds.
NOTICE, BOUND = 10.0, 60.0
_STEP = 0.5  # seconds
_FAILED = 1


@contextmanager
def watching_the_loop(forced_exit: ForcedExit, say: Callable[[str], None]) -> Iterator[None]:
    """In this block, the process is left by ``forced_exit`` when the loop that runs here does not turn."""
    watch = _LoopWatch(trio.lowlevel.current_trio_token(), forced_exit, say)
    thread = threading.Thread(target=watch.run, name="kvmmig loop watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        watch.stopped.set()


class _LoopWatch:
    def __init__(
        self,
        token: trio.lowlevel.TrioToken,
        forced_exit: ForcedExit,
        say: Callable[[str], None],
    ) -> None:
        self.stopped = threading.Event()
        self._token = token
        self._forced_exit = forced_exit
        self._say = say
        self._answered = threading.Event()

    def run(self) -> None:
        while not self.stopped.is_set():
            self._answered.clear()
            with suppress(Exception):  # a broken loop can't even be asked: then there is no answer
                self._token.run_sync_soon(self._answered.set)
            if not self._wait():
                return
            self.stopped.wait(_STEP)

    def _wait(self) -> bool:
        """Wait for the loop's answer; False when there is nothing more to watch."""
        waited, said = 0.0, False
        while not self._answered.is_set():
            began = time.monotonic()
            self._answered.wait(_STEP)
            if self.stopped.is_set():
                return False
            if not _debugged():
                waited += min(time.monotonic() - began, _STEP)
            if waited > NOTICE and not said:
                said = True
                self._warn(
                    f"kvmmig: the event loop has not turned for {NOTICE:g} s, so nobody can reach this "
                    f"machine; when it does not for {BOUND:g} s, this process ends"
                )
            if waited > BOUND:
                self._forced_exit.leave(
                    _FAILED,
                    f"the event loop has not turned for {BOUND:g} s: this process ends, and its guest "
                    "with it, because nobody could reach it any more",
                )
        if said:
            self._warn("kvmmig: the event loop turns again")
        return True

    def _warn(self, text: str) -> None:
        # In a thread of its own: what holds the loop up may be a terminal that nobody reads.
        threading.Thread(target=self._say, args=(text,), daemon=True).start()


def _debugged() -> bool:
    main = threading.main_thread().ident
    frame = sys._current_frames().get(main) if main is not None else None
    while frame is not None:
        if frame.f_trace is not None:
            return True
        frame = frame.f_back
    with suppress(OSError):
        status = Path("/proc/self/status").read_text()
        return int(status.partition("TracerPid:")[2].split()[0]) != 0
    return False
