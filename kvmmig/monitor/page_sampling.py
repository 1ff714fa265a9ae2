"""``page-sampling``, QEMU's way to estimate how fast a guest writes: which of some pages have changed?

It needs no dirty log. What is written twice with the same bytes is not seen, and a small sample is a guess.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvmmig.machine import PAGE_SIZE
from kvmmig.machine.memory import GuestMemory

_WORDS = PAGE_SIZE // 8
_BATCH = 256  # pages: one call copies a megabyte
_GIB = 1 << 30


class PageSample:
    """Pages chosen at random, ``per_gib`` of each GiB of the guest's memory, at least one; their digests.

    Made, and asked, in a thread: either reads all of its pages.
    """

    def __init__(self, memory: GuestMemory, per_gib: int) -> None:
        random = np.random.default_rng()
        count = max(1, memory.n_pages * PAGE_SIZE * per_gib // _GIB)
        self._memory = memory
        self._pages = np.sort(random.choice(memory.n_pages, min(count, memory.n_pages), replace=False))
        # Odd factors: whatever one word changes to, its page's digest changes too.
        self._factors = random.integers(0, 1 << 64, _WORDS, dtype=np.uint64) | np.uint64(1)
        self._digests = self._digest()

    def written(self) -> float:
        """Bytes of the whole memory that have been written since it was made, as far as the sample tells."""
        changed = np.count_nonzero(self._digest() != self._digests) / len(self._pages)
        return float(changed) * self._memory.n_pages * PAGE_SIZE

    def _digest(self) -> npt.NDArray[np.uint64]:
        digests = np.empty(len(self._pages), np.uint64)
        block = np.empty((_BATCH, _WORDS), np.uint64)
        for at in range(0, len(self._pages), _BATCH):
            pages = self._pages[at : at + _BATCH]
            data = self._memory.gather(pages, block[: len(pages)])
            np.matmul(data, self._factors, out=digests[at : at + len(pages)])
        return digests
