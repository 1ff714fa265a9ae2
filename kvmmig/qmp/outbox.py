"""What waits to be sent to one client: bounded, in order."""

from __future__ import annotations

from collections import deque

import trio

_BATCH = 64 << 10  # bytes: many replies go out in one call
_PAUSE_AT = 256 << 10  # bytes: a client that leaves so much unread is not listened to
_MOST_EVENTS = 1 << 20  # bytes


class Outbox:
    """Filled by the task that answers and by whoever has news, emptied by the task that sends.

    Replies are bounded by the reader, who waits for `room` before it answers the next request; events,
    which do not wait, are dropped when too many of them have not been sent.
    """

    def __init__(self) -> None:
        self._lines: deque[tuple[bytes, bool]] = deque()
        self._waiting = 0  # bytes, those that are being sent included
        self._events = 0  # bytes of them
        self._ended = False
        self._changed = trio.lowlevel.ParkingLot()
        self.closed = False
        self.dropped_events = 0

    def put_reply(self, line: bytes) -> None:
        self._put(line, False)

    def put_event(self, line: bytes) -> None:
        if self._events + len(line) > _MOST_EVENTS:
            self.dropped_events += 1
        else:
            self._put(line, True)

    def _put(self, line: bytes, event: bool) -> None:
        if self.closed or self._ended:
            return
        self._lines.append((line, event))
        self._waiting += len(line)
        self._events += len(line) if event else 0
        self._changed.unpark_all()

    async def room(self) -> None:
        """Return when another reply may be made, or the client is gone; a checkpoint only if it must wait."""
        while self._waiting > _PAUSE_AT and not self.closed:
            await self._changed.park()

    async def take(self) -> bytes:
        """The next bytes to send, of several lines at once; b"" at the end."""
        while not self._lines and not self._ended and not self.closed:
            await self._changed.park()
        return self.take_now()

    def take_now(self) -> bytes:
        taken, size = [], 0
        while self._lines and size < _BATCH:
            line, event = self._lines.popleft()
            self._events -= len(line) if event else 0
            taken.append(line)
            size += len(line)
        return b"".join(taken)

    def sent(self, count: int) -> None:
        self._waiting -= count
        self._changed.unpark_all()

    def end(self) -> None:
        """Nothing more will be put."""
        self._ended = True
        self._changed.unpark_all()

    def close(self) -> None:
        """Nothing more will be taken: what waits is dropped."""
        self.closed = True
        self._lines.clear()
        self._changed.unpark_all()
