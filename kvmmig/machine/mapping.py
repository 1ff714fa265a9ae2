"""Guest memory that is a file's, mapped privately: pages come when they are used, and changes stay here."""

from __future__ import annotations

import ctypes
import mmap
import os

from kvmmig.errors import BadConfig
from kvmmig.machine.memory import PAGE_SIZE, GuestMemory
from kvmmig.machine.pageset import Runs

_MAP_FIXED = 0x10
_MADV_POPULATE_WRITE = 23  # Linux 5.14, madvise(2)
_FAILED = ctypes.c_void_p(-1).value
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int),
    *(ctypes.c_int, ctypes.c_int, ctypes.c_int64),
)
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


def own_pages(memory: GuestMemory, first: int, count: int) -> None:
    """Copy what the file still has of these pages: from then on no change of its bytes is seen in them.

    Where it becomes shorter they go with it even so. Raises `BadConfig` where the host has no memory left.
    """
    start = memory.words.ctypes.data + first * PAGE_SIZE
    if _libc.madvise(start, count * PAGE_SIZE, _MADV_POPULATE_WRITE):
        raise BadConfig(f"the guest's memory can't be read from its file: {os.strerror(ctypes.get_errno())}")
