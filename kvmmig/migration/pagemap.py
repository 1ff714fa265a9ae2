"""A guest's memory as a row of blocks, for pictures: what is pending, and how often it was sent."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvmmig.machine.pageset import PageNumbers, PageSet

#: Sends are counted for groups of pages, so many of them at most, whatever the guest's size.
_MOST_GROUPS = 4096
_GROUP_STEP = 64  # a group is so many pages, or a multiple of it: whole words of a bitmap


@dataclass(frozen=True, slots=True, kw_only=True)
class PageMap:
    """A guest's memory as a row of blocks, for pictures. All lists have one number for each block."""

    block_pages: int  # pages in a block; the last one may have fewer
    pages: list[int]  # how many pages it has
    pending: list[int]  # how many of them were written, and not yet accepted by the channel
    sent: list[int]  # how often pages of it have been sent, or said to be zero, so far


class SentCounts:
    """How often pages were sent."""

    def __init__(self, n_pages: int) -> None:
        self._n_pages = n_pages
        self._group = _GROUP_STEP * -(-n_pages // (_GROUP_STEP * _MOST_GROUPS))
        self._sent = np.zeros(-(-n_pages // self._group), np.int64)

    def add(self, pages: PageNumbers) -> None:
        """These were sent, or said to be zero."""
        if len(pages):
            groups: npt.NDArray[np.int64] = pages // self._group
            counts = np.bincount(groups - groups[0])
            self._sent[groups[0] : groups[0] + len(counts)] += counts

    def page_map(self, blocks: int, pages_pending: PageSet) -> PageMap:
        """At most ``blocks`` blocks, and never smaller ones than sends are counted for.

        Takes microseconds a GiB, so it may be called on the event loop. `ValueError` unless ``blocks`` > 0.
        """
        if blocks <= 0:
            raise ValueError(f"{blocks} blocks make no picture; ask for at least 1")
        groups = -(-len(self._sent) // blocks)
        size = groups * self._group
        count = -(-self._n_pages // size)
        pages = [size] * (count - 1) + [self._n_pages - size * (count - 1)]
        starts = np.arange(count)
        words = np.bitwise_count(pages_pending.words).astype(np.int64)
        pending = np.add.reduceat(words, starts * (size // 64))
        sent = np.add.reduceat(self._sent, starts * groups)
        return PageMap(block_pages=size, pages=pages, pending=pending.tolist(), sent=sent.tolist())
