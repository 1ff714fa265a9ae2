"""The end of a process whose event loop does not end: something that a transport has left running holds it.

A task can refuse to be cancelled, and a call can hold the loop itself; either may be a stranger's. The thread
here needs neither the loop nor the main thread.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NoReturn

from kvmmig.cli.logs import to_stderr

#: Seconds that a command may take for its end. What kvmmig itself waits for when it ends takes less.
BOUND = 10.0
_RELEASE = 1.0  # seconds for all of `ForcedExit.before`: a terminal that is stopped holds up whoever writes


class ForcedExit:
    """Leaves the process, `BOUND` seconds after `begin`, unless `stop` comes first.

    The kernel then takes back what a process has: memory, the VM, locks, files that have no name yet, the
    pipes to helpers (who give up at their end). What needs more than that is given to `before`.
    """

    def __init__(self) -> None:
        self._calls: list[Callable[[], None]] = []
        self._say: Callable[[str], None] = to_stderr
        self._stopped: list[threading.Event] = []
        self._status = 1
        self._why = ""

    def begin(self, status: int, why: str = "") -> None:
        """The command is to end now, and to exit with ``status``; ``why`` is what it fails with, if it does.

        Called again, it is what holds then; the time is that of the first call. Safe in a signal handler.
        """
        self._status, self._why = status, why
        if not self._stopped:
            stopped = threading.Event()
            self._stopped.append(stopped)  # a signal may have come since, and have appended its own
            threading.Thread(
                target=self._watch, args=(stopped,), name="kvmmig forced exit", daemon=True
            ).start()

    def stop(self) -> None:
        """It has ended, or what may hold it up has. Idempotent."""
        while self._stopped:
            self._stopped.pop().set()

    @contextmanager
    def before(self, call: Callable[[], None]) -> Iterator[None]:
        """In this block, ``call`` is made before the process is left, by a thread; the newest first."""
        self._calls.append(call)
        try:
            yield
        finally:
            self._calls.remove(call)

    @contextmanager
    def saying(self, say: Callable[[str], None]) -> Iterator[None]:
        """In this block, ``say`` gets the sentences about it, instead of standard error."""
        former, self._say = self._say, say
        try:
            yield
        finally:
            self._say = former

    def leave(self, status: int, why: str) -> NoReturn:
        """Leave the process now, because of ``why``, with what is given to `before` done. For any thread."""
        self._leave(status, [why])

    def _watch(self, stopped: threading.Event) -> None:
        if stopped.wait(BOUND):
            return
        stuck = (
            "something does not end, such as what a transport has left running; after "
            f"{BOUND:g} s this process ends without it"
        )
        self._leave(self._status, [*([self._why] if self._why else []), stuck])

    def _leave(self, status: int, sentences: Sequence[str]) -> NoReturn:
        releasing = threading.Thread(target=self._release, args=(sentences,), daemon=True)
        releasing.start()
        releasing.join(_RELEASE)
        os._exit(status)

    def _release(self, sentences: Sequence[str]) -> None:
        for sentence in sentences:
            self._say(f"kvmmig: {sentence}")
        for call in reversed(self._calls):
            with suppress(Exception):
                call()
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):
                stream.flush()
