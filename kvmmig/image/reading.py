"""Reading an image's file: at any offset, also where it is open with O_DIRECT. Blocks as long as the disk."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable

from kvmmig.image.format import MAGIC, PAGE_SIZE, padded
from kvmmig.image.opened import OpenImage


def reader(fd: int) -> Callable[[int, int], bytes]:
    """A function that gives ``length`` bytes at ``offset``, fewer only at the file's end.

    It raises `OSError`.
    """

    def read(offset: int, length: int) -> bytes:
        start = offset // PAGE_SIZE * PAGE_SIZE
        size = padded(offset + length - start)
        if not size:
            return b""
        with mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as block:
            done = 0
            with memoryview(block) as view:
                while done < size and (count := os.preadv(fd, [view[done:]], start + done)):
                    done += count
            return block[offset - start : min(offset - start + length, done)]

    return read


def stored_parts(fd: int) -> list[tuple[int, int]]:
    """The parts of the file that are no holes: offset and length in bytes. Raises `OSError`."""
    parts: list[tuple[int, int]] = []
    end = os.fstat(fd).st_size
    at = 0
    while at < end:
        try:
            begin = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole is left
                break
            raise
        at = os.lseek(fd, begin, os.SEEK_HOLE)
        parts.append((begin, at - begin))
    return parts


def is_image(fd: int) -> bool:
    """Whether the file says that it is one. Raises `OSError`."""
    return reader(fd)(0, len(MAGIC)) == MAGIC


def open_image(fd: int) -> OpenImage:
    """The image that the file is. Raises `ImageError`, `OSError`."""
    return OpenImage(reader(fd), os.fstat(fd).st_size)
