"""A set of guest pages as a bitmap, laid out as KVM's dirty log is: bit *n* of the bytes is page *n*.

Pages are numbered in RAM order: 0 is the first page of the first region, and the numbers go on without a
gap over the holes between regions (see `kvmmig.machine.memory`). No operation here walks page by page.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Runs: TypeAlias = npt.NDArray[np.int64]
"""Runs of pages: shape ``(n, 2)``, a row is ``first page, how many``; ascending, not overlapping."""

PageNumbers: TypeAlias = npt.NDArray[np.int64]
"""Page numbers, ascending, each once."""

#: How many pages are looked at in one go: 128 MiB of guest, some tens of microseconds of work.
WINDOW = 32768


@dataclass(frozen=True, slots=True)
class Batch:
    """All members of a set that lie in ``[first, stop)``: at most as many pages as were asked for."""

    first: int
    stop: int
    pages: PageNumbers


class PageSet:
    """A mutable set of page numbers in ``range(n_pages)``."""

    def __init__(self, n_pages: int) -> None:
        self.n_pages = n_pages
        #: The bitmap, 64 pages a word; bits past ``n_pages`` are never set.
        self.words: npt.NDArray[np.uint64] = np.zeros((n_pages + 63) // 64, np.uint64)
        self._bytes = self.words.view(np.uint8)

    def __len__(self) -> int:
        return int(np.bitwise_count(self.words).sum(dtype=np.int64))

    def __bool__(self) -> bool:
        return bool(self.words.any())

    def __contains__(self, page: int) -> bool:
        return bool(self._bytes[page >> 3] >> (page & 7) & 1)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PageSet):
            return NotImplemented
        return self.n_pages == other.n_pages and bool((self.words == other.words).all())

    __hash__ = None  # type: ignore[assignment]  # mutable, as set is

    def __repr__(self) -> str:
        return f"<PageSet: {len(self)} of {self.n_pages} pages>"

    def add(self, first: int, count: int = 1) -> None:
        """Put ``count`` pages in, from ``first`` on."""
        self._mask(first, first + count, insert=True)

    def discard(self, first: int, count: int = 1) -> None:
        """Take ``count`` pages out, from ``first`` on; they need not be in."""
        self._mask(first, first + count, insert=False)

    def fill(self) -> None:
        """Put every page in."""
        self.add(0, self.n_pages)

    def clear(self) -> None:
        """Take every page out."""
        self.words[:] = 0

    def update(self, other: PageSet) -> None:
        """Put in what ``other`` has; the same ``n_pages``."""
        np.bitwise_or(self.words, other.words, out=self.words)

    def pages(self, first: int = 0, stop: int | None = None) -> PageNumbers:
        """The members in ``[first, stop)``, ascending."""
        stop = self.n_pages if stop is None else min(stop, self.n_pages)
        start = first >> 3
        bits = np.unpackbits(self._bytes[start : (stop + 7) >> 3], bitorder="little")
        members = np.flatnonzero(bits[first - start * 8 : stop - start * 8])
        members += first
        return members

    def runs(self) -> Runs:
        """The whole set as runs."""
        return runs_of(self.pages())

    def batches(self, limit: int, scattered: int | None = None) -> Iterator[Batch]:
        """The set from its first page to its last, in batches of at most ``limit`` pages.

        A batch of pages that do not lie side by side has at most ``scattered`` of them, if that is given.

        Each batch is found when it is asked for, in bounded time, so this may be iterated on an event loop.
        Members that lie before the place that has been reached may be discarded meanwhile; nothing may be
        added ahead of it.
        """
        at = 0
        while at < self.n_pages:
            end = min(at + WINDOW, self.n_pages)
            members = self.pages(at, end)
            while len(members):
                part = members[:limit]
                if scattered is not None and part[-1] - part[0] + 1 != len(part):
                    part = part[:scattered]
                members = members[len(part) :]
                stop = int(part[-1]) + 1 if len(members) else end
                yield Batch(at, stop, part)
                at = stop
            at = end

    def _mask(self, first: int, stop: int, *, insert: bool) -> None:
        if not 0 <= first <= stop <= self.n_pages:
            raise IndexError(f"pages {first} to {stop} are not all within {self.n_pages}")
        if first == stop:
            return
        low, high = first >> 6, (stop - 1) >> 6
        head = np.uint64((0xFFFF_FFFF_FFFF_FFFF << (first & 63)) & 0xFFFF_FFFF_FFFF_FFFF)
        tail = np.uint64(0xFFFF_FFFF_FFFF_FFFF >> (63 - ((stop - 1) & 63)))
        if low == high:
            head &= tail
        if insert:
            self.words[low] |= head
            self.words[low + 1 : high] = np.uint64(0xFFFF_FFFF_FFFF_FFFF)
            if high > low:
                self.words[high] |= tail
        else:
            self.words[low] &= ~head
            self.words[low + 1 : high] = 0
            if high > low:
                self.words[high] &= ~tail


def runs_of(pages: PageNumbers) -> Runs:
    """Ascending page numbers as runs."""
    if not len(pages):
        return np.empty((0, 2), np.int64)
    if pages[-1] - pages[0] + 1 == len(pages):  # the common case by far
        return np.array([[pages[0], len(pages)]], np.int64)
    breaks = np.flatnonzero(np.diff(pages) != 1)
    firsts = pages[np.concatenate(([0], breaks + 1))]
    lasts = pages[np.concatenate((breaks, [len(pages) - 1]))]
    return np.stack((firsts, lasts - firsts + 1), axis=1)


def pages_of(runs: Runs) -> PageNumbers:
    """Runs as page numbers; the inverse of `runs_of`."""
    counts = runs[:, 1]
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    return np.repeat(runs[:, 0] - (ends - counts), counts) + np.arange(total)
