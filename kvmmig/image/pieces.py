"""Pieces of an image on their way to a file, and how far they have been accepted."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeAlias

from kvmmig.stream import PAGE_SIZE

#: An offset in the file, and the bytes that belong there; both multiples of 4096.
Piece: TypeAlias = tuple[int, memoryview]
_MOST_PIECES = 1024  # for one call


class PieceCursor:
    """A queue of pieces of which any prefix may be taken; a piece may be cut between two pages."""

    def __init__(self) -> None:
        self._pieces: deque[Piece] = deque()
        self._marks: deque[tuple[int, Callable[[], None]]] = deque()
        #: Bytes accepted since the beginning.
        self.accepted = 0
        self._queued = 0

    @property
    def empty(self) -> bool:
        """Everything that was put in has been accepted."""
        return not self._pieces

    def put(self, pieces: Sequence[Piece], accepted: Callable[[], None] | None = None) -> None:
        """Append pieces. ``accepted`` is called as soon as the last byte of them has been."""
        for offset, data in pieces:
            assert offset % PAGE_SIZE == 0 == data.nbytes % PAGE_SIZE, "a piece is whole pages"
            self._pieces.append((offset, data))
            self._queued += data.nbytes
        if accepted is not None:
            self._marks.append((self._queued, accepted))
            self._call_due()

    def head(self, limit: int) -> Sequence[Piece]:
        """The pieces that come next, at most ``limit`` bytes of them, yet a page at least."""
        limit = max(limit // PAGE_SIZE * PAGE_SIZE, PAGE_SIZE)
        taken: list[Piece] = []
        for offset, data in self._pieces:
            if data.nbytes >= limit or len(taken) == _MOST_PIECES - 1:
                taken.append((offset, data[:limit]))
                break
            taken.append((offset, data))
            limit -= data.nbytes
        return taken

    def advance(self, count: int) -> None:
        """``count`` more bytes have been accepted: whole pages."""
        self.accepted += count
        while count:
            offset, data = self._pieces[0]
            if count < data.nbytes:
                self._pieces[0] = offset + count, data[count:]
                break
            count -= data.nbytes
            self._pieces.popleft()
        self._call_due()

    def _call_due(self) -> None:
        while self._marks and self._marks[0][0] <= self.accepted:
            self._marks.popleft()[1]()
