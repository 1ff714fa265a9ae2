"""The record of a migration that runs, read as its machine writes it."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator

from kvmmig.migration.events import (
    AnyEvent,
    Begun,
    Changed,
    Decided,
    PagesMapped,
    Stalled,
    SwitchedOver,
    decode_line,
    sender_of,
)

_KINDS = (Begun, Changed, Decided, PagesMapped, Stalled, SwitchedOver)
# Sends and steps are most of a record, so they are passed over before they are decoded.
_TAGS = "|".join(str(kind.__struct_config__.tag) for kind in _KINDS)
_WANTED = re.compile(rb'\{"by":"[^"]*","event":"(?:%s)"' % _TAGS.encode())
_LATEST = 16 << 20  # bytes: of a long file only so much of its end is read
_AT_ONCE = 4 << 20  # bytes


class RecordTail:
    """Reads what a process appends to a file of records, beginning with its last migration there."""

    def __init__(self, path: str, pid: int, since: float) -> None:
        """``pid`` is the machine's process: others may write to the same file.

        A migration that began before ``since``, by the monotonic clock, is an earlier one.
        """
        self._path = path
        self._pid = pid
        self._since = since
        self._read = -1  # bytes; -1 before the first look
        self._rest = b""
        self._begun: Begun | None = None

    def new_events(self) -> list[tuple[float, AnyEvent]]:
        """What was written since the last call, each with its seconds from the migration's begin.

        What a file lacks, or can't be read, is no event. Blocks as the disk does.
        """
        found: list[tuple[float, AnyEvent]] = []
        for line in self._new_lines():
            if not _WANTED.match(line):
                continue
            try:
                decoded = decode_line(line)
            except ValueError:
                continue
            if decoded is None:
                continue
            by, event = decoded
            if isinstance(event, Begun) and event.pid == self._pid and event.side == "source":
                self._begun = event if event.at >= self._since else None
                found.clear()
            if self._begun is not None and by == sender_of(self._begun):
                found.append((event.at - self._begun.at, event))
        return found

    def _new_lines(self) -> Iterator[bytes]:
        try:
            fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            return
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                return
            if self._read < 0:
                self._read = max(status.st_size - _LATEST, 0)
            while data := os.pread(fd, _AT_ONCE, self._read):
                self._read += len(data)
                *lines, self._rest = (self._rest + data).split(b"\n")
                yield from lines
        except OSError:
            return
        finally:
            os.close(fd)
