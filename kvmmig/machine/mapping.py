"""Guest memory that is a file's, mapped privately: pages come when they are used, and changes stay here."""

from __future__ import annotations

import ctypes
import mmap
import os

from kvmmig.errors import BadConfig
from kvmmig.machine.memory import PAGE_SIZE, GuestMemory
from kvmmig.machine.pageset import Runs

_MAP_FIXED = 0x10
_MREMAP_MAYMOVE, _MREMAP_FIXED = 1, 2
_MADV_POPULATE_WRITE = 23  # Linux 5.14, madvise(2)
_FAILED = ctypes.c_void_p(-1).value
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int),
    *(ctypes.c_int, ctypes.c_int, ctypes.c_int64),
)
_libc.mremap.restype = ctypes.c_void_p
_libc.mremap.argtypes = (*(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t), ctypes.c_int, ctypes.c_void_p)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def map_file(memory: GuestMemory, fd: int, at: int, runs: Runs) -> None:
    """Have the pages of ``runs`` be those of a file in which page 0 would be at offset ``at``.

    What the guest writes is its own and never goes into the file. ``fd`` may be closed afterwards. The file
    must not become shorter, nor its bytes change: pages that the guest has not written would change with
    them, and those that are gone would end this process. For a machine that has no VM yet. Raises
    `BadConfig`.
    """
    base = memory.words.ctypes.data
    for first, count in runs.tolist():
        start, size = base + first * PAGE_SIZE, count * PAGE_SIZE
        flags = mmap.MAP_PRIVATE | _MAP_FIXED
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        if _libc.mmap(start, size, protection, flags, fd, at + first * PAGE_SIZE) == _FAILED:
            raise BadConfig(
                f"the guest's memory can't be mapped from its file: {os.strerror(ctypes.get_errno())}"
            )


class OwnPages:
    """Memory to put in the place of pages that are a file's, so that they need the file no more.

    Copying in place would not do: where a file becomes shorter the kernel takes copies along, too.
    """

    def __init__(self, memory: GuestMemory, first: int, count: int) -> None:
        """Populates ``count`` pages, and touches none of the guest's. Raises `BadConfig` for no memory."""
        self._target = memory.words.ctypes.data + first * PAGE_SIZE
        self._size = count * PAGE_SIZE
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._address = _libc.mmap(None, self._size, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
        if self._address == _FAILED:
            raise BadConfig("this host has no memory for the guest's own pages; restore it elsewhere")
        _libc.madvise(self._address, self._size, mmap.MADV_HUGEPAGE)  # only advice
        if _libc.madvise(self._address, self._size, _MADV_POPULATE_WRITE):
            why = os.strerror(ctypes.get_errno())
            self.drop()
            raise BadConfig(f"this host has no memory for the guest's own pages: {why}")

    def replace(self) -> None:
        """Copy, and put the copy in place: some milliseconds for 16 MiB. Nobody may write meanwhile.

        Who reads meanwhile, the disk for one, sees the same bytes before and after. Raises `BadConfig`.
        """
        ctypes.memmove(self._address, self._target, self._size)
        flags = _MREMAP_MAYMOVE | _MREMAP_FIXED
        if _libc.mremap(self._address, self._size, self._size, flags, self._target) == _FAILED:
            why = os.strerror(ctypes.get_errno())
            self.drop()
            raise BadConfig(f"the guest's own pages can't be put in place: {why}")

    def drop(self) -> None:
        """Give the memory back, where it was not put in place."""
        _libc.munmap(self._address, self._size)
