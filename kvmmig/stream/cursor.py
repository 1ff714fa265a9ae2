"""The exact cursor: what is to be sent, and how far it has been accepted.

A step may end in the middle of a frame, or of a page. The cursor knows the byte, so the next step goes on
there; and it knows when the last byte of a frame was accepted, which is when its pages are no longer owed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice

#: Buffers for one call of `Channel.send_some`: Linux's IOV_MAX.
MAX_BUFFERS = 1024


class Cursor:
    """A queue of buffers of which any prefix may be taken."""

    def __init__(self) -> None:
        self._buffers: deque[memoryview] = deque()
        self._marks: deque[tuple[int, Callable[[], None]]] = deque()
        #: Bytes accepted since the beginning.
        self.accepted = 0
        self._queued = 0

    @property
    def empty(self) -> bool:
        """Everything that was put in has been accepted."""
        return not self._buffers

    def put(self, *buffers: memoryview | bytes, accepted: Callable[[], None] | None = None) -> None:
        """Append buffers. ``accepted`` is called as soon as the last byte of them has been."""
        for buffer in buffers:
            view = memoryview(buffer).cast("B")
            if view.nbytes:
                self._buffers.append(view)
                self._queued += view.nbytes
        if accepted is not None:
            self._marks.append((self._queued, accepted))

    def head(self, limit: int | None = None) -> Sequence[memoryview]:
        """The buffers that come next, at most ``limit`` bytes of them, the first one from where it stands."""
        if limit is None:
            return tuple(islice(self._buffers, MAX_BUFFERS))
        taken: list[memoryview] = []
        for buffer in islice(self._buffers, MAX_BUFFERS):
            if buffer.nbytes >= limit:
                taken.append(buffer[:limit])
                break
            taken.append(buffer)
            limit -= buffer.nbytes
        return taken

    def advance(self, count: int) -> None:
        """``count`` more bytes have been accepted."""
        self.accepted += count
        while count:
            first = self._buffers[0]
            if count < first.nbytes:
                self._buffers[0] = first[count:]
                break
            count -= first.nbytes
            self._buffers.popleft()
        while self._marks and self._marks[0][0] <= self.accepted:
            self._marks.popleft()[1]()
