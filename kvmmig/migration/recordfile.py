"""A file that a migration is recorded to, by a thread of its own: nobody waits for that disk."""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from time import perf_counter

import trio

from kvmmig.errors import MigrationError
from kvmmig.migration.events import Begun, EventsLost, RecordedEvent, encode_lines, sender_of
from kvmmig.transport.places import is_protected

#: Seconds between two writes: what the record lacks at most when this process is killed.
_EVERY = 0.2
#: So many events wait for a slow disk: some 20 MiB. What is more is lost, and counted.
_MOST_WAITING = 200_000
#: Seconds that the end of a migration waits for the disk to take the rest of its record.
_PATIENCE = 2.0


class RecordFile:
    """Appends events to one file. `tell` may be called in any thread, and never blocks."""

    def __init__(self, path: str, fd: int) -> None:
        """Takes ``fd`` over; use `recording`."""
        self._path = path
        self._fd = fd
        self._waiting: deque[RecordedEvent] = deque()
        self._lost = 0
        self._by = ""
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._write_all, name="kvmmig record", daemon=True)
        #: Why the file lacks something, one sentence; empty while it lacks nothing.
        self.problem = ""
        self._thread.start()

    def tell(self, event: RecordedEvent) -> None:
        """Have it written, within some tenths of a second."""
        if isinstance(event, Begun):
            self._by = sender_of(event)
        if len(self._waiting) < _MOST_WAITING and not self.problem:
            self._waiting.append(event)
        else:
            self._lost += 1

    def close(self, patience: float) -> None:
        """Write what is left; block for at most ``patience`` seconds. What is left then is written still, as
        long as this process lives."""
        self._closing.set()
        self._thread.join(patience)
        if self._thread.is_alive():
            self.problem = self.problem or f"the record {self._path} is not written yet: the disk is slow"

    def _write_all(self) -> None:
        try:
            while not self._closing.wait(_EVERY):
                self._write_waiting()
            self._write_waiting()
        except OSError as error:
            self.problem = f"the record {self._path} is not whole: {error.strerror}"
            self._waiting.clear()
        finally:
            os.close(self._fd)

    def _write_waiting(self) -> None:
        events = [self._waiting.popleft() for _ in range(len(self._waiting))]
        if self._lost:
            events.append(EventsLost(at=perf_counter(), count=self._lost))
            self._lost = 0
        data = memoryview(encode_lines(events, self._by))
        while data:
            # Whole lines in one write, as far as the disk has room: another process may append here too.
            data = data[os.write(self._fd, data) :]


@asynccontextmanager
async def recording(path: str | os.PathLike[str]) -> AsyncIterator[RecordFile]:
    """A file to record to, for as long as the block lasts. It is made, or what is in it stays and goes on.

    Raises `MigrationError` where it can't be. At the end, the disk has 2 s to take what is left.
    """
    name = os.path.join(os.getcwd(), path)
    fd = await trio.to_thread.run_sync(_open, name, abandon_on_cancel=True)
    file = RecordFile(name, fd)
    try:
        yield file
    finally:
        with trio.move_on_after(_PATIENCE, shield=True):
            await trio.to_thread.run_sync(file.close, _PATIENCE, abandon_on_cancel=True)


def _open(path: str) -> int:
    if is_protected(path):
        raise MigrationError(
            f"the record can't be {path}: that directory is for kvmmig's own sockets and locks; choose "
            "another place"
        )
    try:
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        if getattr(error, "errno", None) == errno.ENXIO:
            reason = "it is no regular file"
        raise MigrationError(f"the record can't be written to {path}: {reason}") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise MigrationError(f"the record can't be written to {path}: it is no regular file")
    return fd
