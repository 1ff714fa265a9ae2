"""Guest memory: one host mapping, seen by the guest as the RAM of a PC.

RAM reaches from 0 to 3 GiB; the rest of it starts at 4 GiB, above the hole where a PC has its interrupt
controllers and devices. On the host the regions lie one behind the other without a gap, so a page has one
number (its place in RAM order) and one place in the mapping, whatever its physical address is.
"""

from __future__ import annotations

import contextlib
import threading
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import trio

from kvmmig.errors import BadConfig, WrongState
from kvmmig.machine.pageset import PageSet, Runs, pages_of
from kvmmig.machine.populating import Populating, Reserve, anonymous

PAGE_SIZE = 4096
#: Where the hole of a PC begins and ends: RAM goes on behind it.
HOLE = (3 << 30, 4 << 30)
#: RAM comes in these units: 64 pages are one word of a dirty bitmap, so no word spans two regions.
MEMORY_UNIT = 64 * PAGE_SIZE

_CLEAR_CHUNK = 64 << 20


@dataclass(frozen=True, slots=True)
class Region:
    """A stretch of RAM that is contiguous for the guest: one KVM memory slot."""

    slot: int
    gpa: int  # guest-physical address of its first byte
    size: int  # bytes
    first_page: int  # number of its first page in RAM order


def pc_regions(size: int) -> tuple[Region, ...]:
    """The regions of a PC with ``size`` bytes of RAM."""
    low = min(size, HOLE[0])
    regions = [Region(0, 0, low, 0)]
    if size > low:
        regions.append(Region(1, HOLE[1], size - low, low // PAGE_SIZE))
    return tuple(regions)


class GuestMemory:
    """The RAM of one guest: private anonymous memory, huge pages advised.

    ``gpa`` is a guest-physical address; `ValueError` where there is no RAM. Whoever creates it closes it,
    after the VM that uses it. Views that are still held then keep the mapping alive until they go.
    """

    def __init__(self, size: int, reserve: Reserve | None = None) -> None:
        """``reserve`` is memory that is there already, which this takes. Raises `BadConfig`."""
        if size <= 0 or size % MEMORY_UNIT:
            raise BadConfig(
                f"a guest can't have {size} bytes of memory; use a multiple of {MEMORY_UNIT // 1024} KiB"
            )
        #: Bytes.
        self.size = size
        #: Pages of 4 KiB.
        self.n_pages = size // PAGE_SIZE
        #: Where they lie for the guest.
        self.regions = pc_regions(size)
        self._map = anonymous(size) if reserve is None else reserve.take(size)
        self._view = memoryview(self._map)
        #: All of RAM as 64-bit words, shape ``(n_pages, 512)``: a row is a page.
        self.words: npt.NDArray[np.uint64] = np.frombuffer(self._map, np.uint64).reshape(self.n_pages, 512)
        self._base = self.words.ctypes.data
        self._populating: Populating | None = None
        self._host_writes: PageSet | None = None
        self._lock = threading.Lock()

    def populate(self) -> None:
        """Touch every page from now on, in the background: neither the guest nor a receiver waits for it."""
        self._populating = Populating(self._map)

    def check_populated(self) -> None:
        """Raise `BadConfig` where it has turned out that the host has not got the memory."""
        if self._populating is not None:
            self._populating.check()

    async def clear(self) -> None:
        """Make all of it zero, in a thread. No migration sees it. A cancel leaves part of it as it was."""
        for start in range(0, self.size, _CLEAR_CHUNK):
            await trio.to_thread.run_sync(self._clear, start, min(_CLEAR_CHUNK, self.size - start))

    def _clear(self, start: int, length: int) -> None:
        first = start // PAGE_SIZE
        self.words[first : first + length // PAGE_SIZE] = 0

    def address(self, region: Region) -> int:
        """The host's address of a region's first byte, for KVM_SET_USER_MEMORY_REGION."""
        return self._base + region.first_page * PAGE_SIZE

    def offset(self, gpa: int, length: int) -> int:
        """Where ``length`` bytes at ``gpa`` lie in the mapping; `ValueError` if not all are in one region."""
        for region in self.regions:
            if region.gpa <= gpa and gpa + length <= region.gpa + region.size:
                return region.first_page * PAGE_SIZE + gpa - region.gpa
        raise ValueError(f"{length} bytes at {gpa:#x} are not all inside the guest's memory")

    def view(self, gpa: int, length: int) -> memoryview:
        """``length`` bytes at ``gpa``, live and writable. No migration sees what is written here."""
        start = self.offset(gpa, length)
        return self._view[start : start + length]

    def read(self, gpa: int, length: int) -> bytes:
        """A copy of ``length`` bytes at ``gpa``."""
        return bytes(self.view(gpa, length))

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Write as a device does: a running migration knows of it (KVM's dirty log does not). Thread-safe."""
        if not len(data):
            return
        self.view(gpa, len(data))[:] = data
        first = self.offset(gpa, len(data)) // PAGE_SIZE
        last = (self.offset(gpa, len(data)) + len(data) - 1) // PAGE_SIZE
        with self._lock:
            if self._host_writes is not None:
                self._host_writes.add(first, last - first + 1)

    def pages(self, first: int, count: int = 1) -> memoryview:
        """``count`` pages from page number ``first`` on, live, as bytes."""
        return self._view[first * PAGE_SIZE : (first + count) * PAGE_SIZE]

    def zero(self, runs: Runs) -> None:
        """Make pages zero. One memset a run: keep the sum small when on an event loop."""
        for first, count in runs.tolist():
            self.words[first : first + count] = 0

    def gather(self, pages: npt.NDArray[np.int64], into: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        """Copy these pages ``into`` an array of shape ``(n, 512)``, and return it."""
        block = self._contiguous(pages)
        if block is None:
            np.take(self.words, pages, axis=0, out=into, mode="clip")  # unbuffered, unlike mode="raise"
        else:
            np.copyto(into, block)
        return into

    def scatter(self, runs: Runs, data: npt.NDArray[np.uint64]) -> None:
        """Put the pages of ``data``, shape ``(n, 512)``, into the places of ``runs``, in order."""
        self.words[pages_of(runs)] = data

    def are_zero(self, pages: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Which of these pages hold nothing but zeros. The guest may write one right afterwards."""
        block = self._contiguous(pages)
        heads = self.words[pages, 0] if block is None else block[:, 0]
        zero: npt.NDArray[np.bool_] = heads == 0
        candidates = np.flatnonzero(zero)
        if len(candidates):  # the first word has already ruled out nearly all pages that hold data
            maybe = pages[candidates]
            block = self._contiguous(maybe)
            block = self.words[maybe] if block is None else block
            zero[candidates] = ~block.any(axis=1)  # twice as fast as bitwise_or.reduce
        return zero

    def _contiguous(self, pages: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64] | None:
        """These pages without a copy, or None where they do not lie side by side."""
        first, last = int(pages[0]), int(pages[-1])
        return self.words[first : last + 1] if last - first + 1 == len(pages) else None

    def track_host_writes(self, on: bool) -> None:
        """Start or stop remembering what `write` touched. Thread-safe.

        Raises `WrongState` where somebody has started it already.
        """
        with self._lock:
            if on and self._host_writes is not None:
                raise WrongState(
                    "the guest's dirty log is in use already; one migration or measurement at a time has it"
                )
            self._host_writes = PageSet(self.n_pages) if on else None

    def take_host_writes(self, into: PageSet) -> None:
        """Move what was remembered into a set. Thread-safe."""
        with self._lock:
            if self._host_writes is not None:
                into.update(self._host_writes)
                self._host_writes.clear()

    def close(self) -> None:
        """Give the memory back. Blocks for milliseconds while it is being populated. Idempotent."""
        if self._populating is not None:
            self._populating.stop()
        self._view.release()
        self.words = np.empty((0, 512), np.uint64)
        with contextlib.suppress(BufferError):  # somebody still reads it: it goes when they do
            self._map.close()
