"""From pending pages to frames: batch by batch, each prepared by a thread while one is being sent.

Over a link, live memory is sent as it lies there; yet to find out what is zero takes milliseconds a batch in
a guest whose pages begin with zeros, and scattered pages are copied. What may be stored is copied always, and
gets a digest: as much work as sending it.
"""

from __future__ import annotations

import contextlib
import mmap
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import trio

from kvmmig import stream
from kvmmig.machine.memory import GuestMemory
from kvmmig.machine.pageset import Batch, PageNumbers, PageSet, Runs, runs_of
from kvmmig.migration.pagemap import PageMap, SentCounts
from kvmmig.stream import Cursor

#: Runs shorter than this on average are gathered into one copy: a memcpy costs less than so many buffers.
_GATHER_BELOW = 16
#: The most pages that are copied in one go: 8 MiB.
_COPIED_PAGES = 2048
#: The most pages of one frame that do not lie side by side, and of one batch of them.
_SCATTERED_PAGES = stream.MAX_RUNS


@dataclass(frozen=True, slots=True)
class _Frame:
    """What one frame will hold: runs of pages with their bytes, or runs of zero pages."""

    runs: Runs
    data: list[memoryview]
    digest: bytes


@dataclass(frozen=True, slots=True)
class _Prepared:
    batch: Batch
    zeros: list[Runs]
    frames: list[_Frame]


class PendingPages:
    """Puts what is pending into the cursor: `begin`, then ``await more()`` until it returns False.

    A page leaves ``pending`` when the last byte of its frame has been accepted. What was prepared and not
    yet put is nothing to anybody: after `settle` its pages are simply still pending.
    """

    def __init__(
        self, memory: GuestMemory, pending: PageSet, encoder: stream.Encoder, cursor: Cursor
    ) -> None:
        self._memory = memory
        self._pending = pending
        self._encoder = encoder
        self._cursor = cursor
        #: Copy pages, and give each frame a digest. To be set before anything is sent.
        self.stable = False
        self._slabs = _Slabs()
        self._batches: Iterator[Batch] = iter(())
        # What the thread is at: nothing, or something, and what came of it.
        self._busy = False
        self._ahead: Callable[[], _Prepared] | None = None
        self._done = trio.Event()
        self._sent = SentCounts(memory.n_pages)

    def begin(self) -> None:
        """Start over from the first pending page. Nothing may be put into ``pending`` before all are sent."""
        # Pages that are copied first come in smaller batches: a copy takes time. Others come in large
        # frames, which cost both sides less.
        limit = _COPIED_PAGES if self.stable else stream.MAX_FRAME_PAGES
        self._batches = self._pending.batches(limit, _SCATTERED_PAGES)
        self._ahead = None

    async def more(self) -> bool:
        """Put the next batch into the cursor; False when there is none. A cancel has put nothing."""
        if not self._busy and self._ahead is None and not self._start():
            return False
        while self._busy:
            await self._done.wait()
        assert self._ahead is not None
        prepared, self._ahead = self._ahead(), None
        self._start()
        self._put(prepared)
        return True

    async def settle(self) -> None:
        """Wait for the thread, a few milliseconds, and forget what it has prepared."""
        while self._busy:
            await self._done.wait()
        self._batches, self._ahead = iter(()), None

    def page_map(self, blocks: int) -> PageMap:
        """As `SentCounts.page_map`."""
        return self._sent.page_map(blocks, self._pending)

    def _start(self) -> bool:
        """Have the thread prepare the next batch, if there is one."""
        batch = next(self._batches, None)
        if batch is None:
            return False
        self._busy, self._done = True, trio.Event()
        token = trio.lowlevel.current_trio_token()
        trio.lowlevel.start_thread_soon(
            partial(self._prepare, batch), lambda outcome: token.run_sync_soon(self._note, outcome.unwrap)
        )
        return True

    def _note(self, result: Callable[[], _Prepared]) -> None:
        self._busy, self._ahead = False, result
        self._done.set()

    def _prepare(self, batch: Batch) -> _Prepared:
        """Look for zeros, copy, digest. Touches guest memory and nothing else, so a thread may run it."""
        zero = self._memory.are_zero(batch.pages)
        zeros = [runs_of(pages) for pages in _frames(batch.pages[zero])]
        frames = []
        for pages in _frames(batch.pages[~zero]):
            runs = runs_of(pages)
            if self.stable or len(pages) < len(runs) * _GATHER_BELOW:
                data = [self._memory.gather(pages, self._slabs.rows(len(pages))).data.cast("B")]
            else:
                data = [self._memory.pages(first, count) for first, count in runs.tolist()]
            frames.append(_Frame(runs, data, stream.digest(data) if self.stable else b""))
        return _Prepared(batch, zeros, frames)

    def _put(self, prepared: _Prepared) -> None:
        for runs in prepared.zeros:
            self._cursor.put(self._encoder.zero_runs(runs))
        for frame in prepared.frames:
            self._cursor.put(*self._encoder.page_runs(frame.runs, frame.data, frame.digest))
        batch = prepared.batch
        self._sent.add(batch.pages)
        self._cursor.put(accepted=lambda: self._pending.discard(batch.first, batch.stop - batch.first))


class _Slabs:
    """Memory for copies, used again when nobody looks at it any more: fresh memory costs page faults."""

    def __init__(self) -> None:
        self._free: deque[npt.NDArray[np.uint64]] = deque()  # its methods are atomic: threads use them

    def rows(self, count: int) -> npt.NDArray[np.uint64]:
        """An array of ``count`` pages, `_COPIED_PAGES` at most. It is free again when its last view goes."""
        try:
            slab = self._free.pop()
        except IndexError:
            slab = _fresh_slab()
        rows = slab[:count]
        weakref.finalize(rows, self._free.append, slab).atexit = False
        return rows


def _fresh_slab() -> npt.NDArray[np.uint64]:
    # A mapping of its own goes back to the kernel with its last view; what malloc gives a thread may stay.
    block = mmap.mmap(-1, _COPIED_PAGES * stream.PAGE_SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        block.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(block, np.uint64).reshape(_COPIED_PAGES, stream.PAGE_SIZE // 8)


def _frames(pages: PageNumbers) -> Iterator[PageNumbers]:
    """Cut pages into what one frame may have: all of them where they lie side by side."""
    if len(pages) and pages[-1] - pages[0] + 1 == len(pages):
        yield pages
    else:
        for first in range(0, len(pages), _SCATTERED_PAGES):
            yield pages[first : first + _SCATTERED_PAGES]
