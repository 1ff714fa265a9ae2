"""An I/O helper as VMMs have had it: it fills a buffer from its standard input, writes it, and begins again.

    helper.py FD

The buffer has 1 MiB, the file is open with O_DIRECT. While it writes it does not read, and the pipe fills.
"""

from __future__ import annotations

import mmap
import os
import sys

SIZE = 1 << 20
ALIGNMENT = 4096


def main(fd: int) -> None:
    buffer = memoryview(mmap.mmap(-1, SIZE))
    written, size = 0, SIZE
    while size == SIZE:
        size = 0
        while size < SIZE and (count := os.readv(0, [buffer[size:]])):
            size += count
        written += os.write(fd, buffer[: -(-size // ALIGNMENT) * ALIGNMENT]) and size
    os.ftruncate(fd, written)
    os.fdatasync(fd)


if __name__ == "__main__":
    main(int(sys.argv[1]))
