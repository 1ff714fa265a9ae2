"""An image in the making: its tables grow with the pages that are written, whatever the order."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable, Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from kvmmig import stream
from kvmmig.image.format import (
    BLOCK_PAGES,
    MEMORY_AT,
    PAGE_SIZE,
    Header,
    Layout,
    Words,
    block_digest,
    digest_of,
    encode_head,
    encode_state,
    padded,
    seed_of,
)
from kvmmig.image.pieces import Piece

Runs = stream.Runs
#: Writing pages that lie between two runs, and are in the file already, is cheaper than a second write, up
#: to so many of them: a write by itself costs a disk about as much time as 128 KiB do.
_BRIDGED = 32


class Builder:
    """Turns pages into pieces of the file, and knows its tables.

    A page may be written any number of times, and read while it changes: what is written after that counts.
    `write` may be called in several threads for different blocks, `finish` when all of them have returned.
    """

    def __init__(self, n_pages: int, memory: Callable[[int, int], memoryview]) -> None:
        """``memory(first, count)`` gives so many live pages."""
        self.layout = Layout(n_pages)
        self._memory = memory
        self.identity = os.urandom(16)
        self._seed = seed_of(self.identity)
        self._map: Words = np.zeros(self.layout.n_blocks, np.uint64)
        self._bits = self._map.view(np.uint8)
        self._digests: Words = np.zeros(self.layout.n_blocks, np.uint64)

    def room(self) -> list[Piece]:
        """To be written first: the file gets its length, and what follows need not extend it page by page."""
        return [(self.layout.page_map_at, memoryview(bytes(PAGE_SIZE)))]

    def write(self, first: int, wanted: npt.NDArray[np.bool_], zero: npt.NDArray[np.bool_]) -> list[Piece]:
        """The pieces for the ``wanted`` ones of the pages from ``first`` on, those that are ``zero`` known.

        ``first`` and the arrays' length are multiples of 64. Looks at the memory, for the digests; takes as
        long as reading every block that has a wanted page.
        """
        low, high = first // BLOCK_PAGES, (first + len(wanted)) // BLOCK_PAGES
        bits = self._bits[low * 8 : high * 8]
        there = np.unpackbits(bits, bitorder="little").view(np.bool_)
        # A hole is all zeros already; where the file has a page, it must be written though it is zero now.
        data = wanted & (~zero | there)
        bits |= np.packbits(data, bitorder="little")
        touched = np.flatnonzero(wanted.reshape(-1, BLOCK_PAGES).any(axis=1)) + low
        for block in touched[self._map[touched] != 0].tolist():
            self._digests[block] = block_digest(self._memory(block * BLOCK_PAGES, BLOCK_PAGES), self._seed)
        return [
            (MEMORY_AT + (first + start) * PAGE_SIZE, self._memory(first + start, stop - start))
            for start, stop in _bridged(data, there).tolist()
        ]

    def finish(
        self, machine: bytes, sections: Sequence[stream.Section], *, running: bool, saved_by: str
    ) -> list[Piece]:
        """The rest of the file; the head, which binds all of it together, comes last.

        ``machine`` is a JSON object. Raises `ImageError`.
        """
        state = encode_state(list(sections))
        page_map, digests = self._map.astype("<u8").tobytes(), self._digests.astype("<u8").tobytes()
        header = Header(
            n_pages=self.layout.n_pages,
            data_pages=self.data_pages,
            running=running,
            saved_by=saved_by,
            saved_at=time.time(),
            size=self.layout.size(len(state)),
            state_size=len(state),
            page_map=digest_of(page_map, self._seed),
            digests=digest_of(digests, self._seed),
            state=digest_of(state, self._seed),
            machine=msgspec.Raw(machine),
        )
        return [
            (self.layout.page_map_at, _aligned(page_map)),
            (self.layout.digests_at, _aligned(digests)),
            (self.layout.state_at, _aligned(state)),
            (0, _aligned(encode_head(header, self.identity))),
        ]

    @property
    def data_pages(self) -> int:
        """Pages that the file has data for."""
        return int(np.bitwise_count(self._map).sum(dtype=np.int64))


def _bridged(data: npt.NDArray[np.bool_], there: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Runs of ``data`` as rows ``start, stop``, joined where what lies between is ``there`` and short."""
    edges = np.flatnonzero(np.diff(data, prepend=False, append=False)).reshape(-1, 2)
    if len(edges) < 2:
        return edges
    known = np.concatenate(([0], np.cumsum(there)))
    begins, ends = edges[:-1, 1], edges[1:, 0]
    gaps = ends - begins
    apart = np.flatnonzero((gaps > _BRIDGED) | (known[ends] - known[begins] != gaps))
    starts = edges[np.concatenate(([0], apart + 1)), 0]
    stops = edges[np.concatenate((apart, [len(edges) - 1])), 1]
    return np.stack((starts, stops), axis=1)


def _aligned(data: bytes) -> memoryview:
    """A copy that O_DIRECT takes as it is: at a page's beginning, zeros to a page's end."""
    block = mmap.mmap(-1, padded(len(data)), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    block[: len(data)] = data
    return memoryview(block)
