"""From pending pages to pieces of an image: windows of memory, prepared by threads while others are written.

What lies in memory is written as it lies there. A page that the guest writes meanwhile is dirty again, and so
are the digests of its block: both are written again by the end, when the guest stands still.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import trio

import kvmmig
from kvmmig import image, stream
from kvmmig.machine.memory import GuestMemory
from kvmmig.machine.pageset import PageNumbers, PageSet
from kvmmig.migration.pagemap import PageMap, SentCounts

#: What a thread looks at in one go: 16 MiB, some milliseconds; whole blocks.
_WINDOW = 64 * image.BLOCK_PAGES
#: So many windows are prepared at a time: each in a thread of its own.
_AHEAD = 3


class _Window:
    """A window that a thread prepares."""

    def __init__(self) -> None:
        self.done = trio.Event()
        self.pages: PageNumbers = np.empty(0, np.int64)
        self.zero_pages = 0
        self.pieces: Sequence[image.Piece] = ()
        self.error: Exception | None = None


class ImagePages:
    """Puts what is pending into the cursor: `begin`, then ``await more()`` until it returns False.

    A page leaves ``pending`` when its bytes have been accepted. What was prepared and not yet put is nothing
    to anybody: after `settle` its pages are simply still pending.
    """

    def __init__(self, memory: GuestMemory, pending: PageSet, cursor: image.PieceCursor) -> None:
        self._memory = memory
        self._pending = pending
        self._cursor = cursor
        self._builder = image.Builder(memory.n_pages, memory.pages)
        self._sent = SentCounts(memory.n_pages)
        self._windows: Iterator[int] = iter(())
        self._ahead: deque[tuple[int, _Window]] = deque()
        #: Pages that were put with their bytes; a page counts each time.
        self.pages = 0
        #: Pages that were found to be zero.
        self.zero_pages = 0
        self.identity = self._builder.identity
        cursor.put(self._builder.room())

    def begin(self) -> None:
        """Start over from the first pending page. Nothing may be put into ``pending`` before all are put."""
        assert not self._ahead, "settle comes first"
        starts = np.unique(np.flatnonzero(self._pending.words) * 64 // _WINDOW) * _WINDOW
        self._windows = iter(starts.tolist())

    async def more(self) -> bool:
        """Put what comes next into the cursor; False when there is nothing more. A cancel loses nothing."""
        while self._cursor.empty:
            while len(self._ahead) < _AHEAD and (first := next(self._windows, None)) is not None:
                self._start(first)
            if not self._ahead:
                return False
            await self._ahead[0][1].done.wait()
            self._put(*self._ahead.popleft())
        return True

    async def settle(self) -> None:
        """Wait for the threads, a few milliseconds, and forget what they have prepared."""
        while self._ahead:
            await self._ahead[0][1].done.wait()
            self._ahead.popleft()
        self._windows = iter(())

    def finish(self, machine: bytes, sections: Sequence[stream.Section], *, running: bool) -> None:
        """Put the rest of the image into the cursor, when all pages have been put."""
        saved_by = f"kvmmig {kvmmig.__version__}"
        self._cursor.put(self._builder.finish(machine, sections, running=running, saved_by=saved_by))

    def page_map(self, blocks: int) -> PageMap:
        """As `SentCounts.page_map`."""
        return self._sent.page_map(blocks, self._pending)

    def _put(self, first: int, window: _Window) -> None:
        if window.error is not None:
            raise window.error
        self._sent.add(window.pages)
        self.zero_pages += window.zero_pages
        self.pages += len(window.pages) - window.zero_pages
        count = min(_WINDOW, self._memory.n_pages - first)
        self._cursor.put(window.pieces, accepted=partial(self._pending.discard, first, count))

    def _start(self, first: int) -> None:
        window = _Window()
        self._ahead.append((first, window))
        token = trio.lowlevel.current_trio_token()

        def deliver(outcome: object) -> None:
            token.run_sync_soon(window.done.set)

        trio.lowlevel.start_thread_soon(partial(self._prepare, first, window), deliver)

    def _prepare(self, first: int, window: _Window) -> None:
        """Look for zeros, digest. A thread runs it; for the window alone, so several may at once."""
        try:
            stop = min(first + _WINDOW, self._memory.n_pages)
            window.pages = pages = self._pending.pages(first, stop)
            wanted, zero = np.zeros((2, stop - first), np.bool_)
            wanted[pages - first] = True
            zero[pages - first] = self._memory.are_zero(pages)
            window.zero_pages = int(zero.sum())
            window.pieces = self._builder.write(first, wanted, zero)
        except Exception as error:
            window.error = error
