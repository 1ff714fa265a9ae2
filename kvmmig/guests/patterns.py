"""The orders in which the dirtier rewrites its hot pages: each page's generation after so many steps.

dirtier.asm says what the orders are; the same is computed here, so that the host can check a stopped guest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

#: The same constants as in dirtier.asm.
C1, C3 = 0x9E3779B97F4A7C15, 0x27220A95FE47C21B

Words = npt.NDArray[np.uint64]

_WORD = (1 << 64) - 1
_CHUNK = 1 << 20


class Pattern(Protocol):
    """One vCPU's order, at a moment: so many steps were done."""

    @property
    def next(self) -> int | None:
        """The hot page whose turn the next step is, by its index; None where it is nobody's."""

    def generations(self, pages: Words) -> Words:
        """How often each of these hot pages, given by their indices, has been rewritten."""


@dataclass(frozen=True, slots=True)
class Sweep:
    """One after the other."""

    hot: int
    steps: int

    @property
    def next(self) -> int | None:
        return self.steps % self.hot

    def generations(self, pages: Words) -> Words:
        laps, done = divmod(self.steps, self.hot)
        return np.uint64(laps) + (pages < np.uint64(done)).astype(np.uint64)


class Random:
    """Each once a lap, in an order that is drawn anew for each lap."""

    def __init__(self, hot: int, steps: int) -> None:
        self._degree = (hot - 1).bit_length()
        self._lap, self._done = divmod(steps, 1 << self._degree)
        self._hot = hot
        self._seen = np.zeros(1 << self._degree, np.bool_)
        for start in range(0, self._done, _CHUNK):
            turns = np.arange(start, min(start + _CHUNK, self._done), dtype=np.uint64)
            self._seen[self._shuffled(turns)] = True

    @property
    def next(self) -> int | None:
        page = int(self._shuffled(np.array([self._done], np.uint64))[0])
        return page if page < self._hot else None

    def generations(self, pages: Words) -> Words:
        return np.uint64(self._lap) + self._seen[pages].astype(np.uint64)

    def _shuffled(self, turns: Words) -> Words:
        """The permutation of this lap: every step is a bijection of numbers of so many bits."""
        key = (C1 * self._lap + C3) & _WORD
        mask, shift = np.uint64((1 << self._degree) - 1), np.uint64(self._degree // 2 + 1)
        x = (turns + np.uint64(key)) * np.uint64(key >> 17 | 1) & mask
        x ^= x >> shift
        x = x * np.uint64(C1) & mask
        return x ^ x >> shift


@dataclass(frozen=True, slots=True)
class Zipf:
    """Classes of 1, 2, 4, ... pages take turns, and so do the pages of each class."""

    hot: int
    steps: int

    @property
    def next(self) -> int | None:
        turn, level = divmod(self.steps, self.hot.bit_length())
        page = (1 << level) - 1 + turn % (1 << level)
        return page if page < self.hot else None

    def generations(self, pages: Words) -> Words:
        turns, done = divmod(self.steps, self.hot.bit_length())
        level = np.zeros_like(pages)
        for power in range(1, self.hot.bit_length()):
            level += pages >= np.uint64((1 << power) - 1)
        size = np.uint64(1) << level
        all_turns = np.uint64(turns) + (level < np.uint64(done)).astype(np.uint64)
        return (all_turns + size - np.uint64(1) - (pages + np.uint64(1) - size)) >> level


#: By the number that the guest knows each by.
PATTERNS: Mapping[int, Callable[[int, int], Pattern]] = {0: Sweep, 1: Random, 2: Zipf}
