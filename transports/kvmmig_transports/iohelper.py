"""The I/O helper of ``pipe:``: ``python -I -S iohelper.py FILENAME FD``, the command line of libvirt's.

FD is FILENAME, already open; its access mode says the direction: a file open for writing is filled from
standard input, one open for reading is copied to standard output. One thread fills aligned blocks while the
other empties them, so that the pipe and the disk work at the same time. With O_DIRECT the last block is
padded, and the padding cut off again.

Ends with status 0 when everything has been copied and, in a file, is on the disk; otherwise with status 1
and one line on standard error. It imports little, for it is started while a guest waits to be saved.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import queue
import sys
import threading
from collections.abc import Callable

_BLOCK = 4 << 20
_BLOCKS = 3
_ALIGNMENT = 4096

_Filled = tuple[memoryview, int] | OSError


def copy(fill: Callable[[memoryview], int], empty: Callable[[memoryview, int], None]) -> None:
    """Call ``fill(block) -> size`` in a thread and ``empty(block, size)`` here, until a block is not full."""
    area = mmap.mmap(-1, _BLOCK * _BLOCKS, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # O_DIRECT pins a block's pages one by one: let there be few
        area.madvise(mmap.MADV_HUGEPAGE)
    pool = memoryview(area)
    free: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
    filled: queue.SimpleQueue[_Filled] = queue.SimpleQueue()
    for start in range(0, len(pool), _BLOCK):
        free.put(pool[start : start + _BLOCK])

    def work() -> None:
        size = _BLOCK
        while size == _BLOCK:
            block = free.get()
            try:
                size = fill(block)
            except OSError as error:
                filled.put(error)
                return
            filled.put((block, size))

    threading.Thread(target=work, daemon=True).start()
    size = _BLOCK
    while size == _BLOCK:
        item = filled.get()
        if isinstance(item, OSError):
            raise item
        block, size = item
        empty(block, size)
        free.put(block)


def fill_from(fd: int) -> Callable[[memoryview], int]:
    """Read whole blocks from ``fd``, a pipe or a file; only the last may be short."""

    direct = _is_direct(fd)

    def fill(block: memoryview) -> int:
        size = 0
        while size < _BLOCK and (count := os.readv(fd, [block[size:]])):
            size += count
            if direct and size % _ALIGNMENT:
                break  # the end: O_DIRECT refuses to look behind it from here
        return size

    return fill


def empty_to_pipe(fd: int) -> Callable[[memoryview, int], None]:
    def empty(block: memoryview, size: int) -> None:
        done = 0
        while done < size:
            done += os.write(fd, block[done:size])

    return empty


def empty_to_file(fd: int) -> Callable[[memoryview, int], None]:
    direct = _is_direct(fd)

    def empty(block: memoryview, size: int) -> None:
        end = -(-size // _ALIGNMENT) * _ALIGNMENT if direct else size
        block[size:end] = bytes(end - size)
        done = 0
        while done < end:
            done += os.write(fd, block[done:end])
        if end > size:
            os.ftruncate(fd, os.fstat(fd).st_size - (end - size))

    return empty


def _is_direct(fd: int) -> bool:
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)


def main(arguments: list[str]) -> int:
    if len(arguments) != 2 or not arguments[1].isdecimal():
        print("usage: iohelper.py FILENAME FD", file=sys.stderr)
        return 1
    name, fd = arguments[0], int(arguments[1])
    try:
        reading = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
    except OSError as error:
        print(f"{name}: file descriptor {fd}: {error.strerror}", file=sys.stderr)
        return 1
    try:
        if reading:
            copy(fill_from(fd), empty_to_pipe(1))
        else:
            copy(fill_from(0), empty_to_file(fd))
            os.fdatasync(fd)
    except OSError as error:
        verb, done = "read" if reading else "write", os.lseek(fd, 0, os.SEEK_CUR)
        print(f"can't {verb} {name} at byte {done}: {error.strerror}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stderr.flush()
    os._exit(status)  # without waiting for a thread that may still be reading
