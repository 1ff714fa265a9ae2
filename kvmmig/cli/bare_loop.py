"""A bare loop: a process that does nothing but sleep a millisecond at a time and see how late it wakes up.

It stands beside a figure that is beyond its bound, and says what this host did to somebody else meanwhile.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Self

import trio

# Each line on its standard input it answers with the worst lateness since the last one. A process of its own
# has no other threads that could hold it up, and imports next to nothing.
_LOOP = """
import os, select, signal
from time import perf_counter
signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends with its input
SLEEP = 0.001
worst = 0.0
while True:
    began = perf_counter()
    asked, _, _ = select.select([0], [], [], SLEEP)
    worst = max(worst, perf_counter() - began - SLEEP)
    if asked:
        if not os.read(0, 1):
            break
        os.write(1, f"{worst:.6f}\\n".encode())
        worst = 0.0
"""


class BareLoop:
    """The process, seen from the command that has started it."""

    def __init__(self, process: trio.Process) -> None:
        self._process = process

    @classmethod
    @asynccontextmanager
    async def start(cls) -> AsyncIterator[Self]:
        """Have it run in this block."""
        command = [sys.executable, "-I", "-S", "-c", _LOOP]
        async with trio.open_nursery() as nursery:
            run = partial(
                trio.run_process,
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                check=False,
            )
            yield cls(await nursery.start(run))
            nursery.cancel_scope.cancel()

    async def worst(self) -> float | None:
        """Seconds that it woke up too late at most, since this was asked last; None when it is gone."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            await stdin.send_all(b"\n")
            answer = await stdout.receive_some()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return None
        return float(answer) if answer else None
