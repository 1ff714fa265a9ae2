"""What one non-blocking call may take of a long list of buffers."""

from __future__ import annotations

from collections.abc import Sequence

_MOST_BUFFERS = 1024  # IOV_MAX


def prefix(buffers: Sequence[memoryview], most: int) -> list[memoryview]:
    """The longest prefix of ``buffers`` that is no longer than ``most`` bytes and fits one system call."""
    taken: list[memoryview] = []
    for buffer in buffers[:_MOST_BUFFERS]:
        if len(buffer) >= most:
            taken.append(buffer[:most])
            break
        taken.append(buffer)
        most -= len(buffer)
    return taken
