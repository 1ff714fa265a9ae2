"""What one call takes of a long list of buffers, and what it leaves."""

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


def behind(buffers: Sequence[memoryview], count: int) -> list[memoryview]:
    """What is left of ``buffers`` behind their first ``count`` bytes."""
    left = list(buffers)
    while count:
        taken = min(count, len(left[0]))
        count -= taken
        left[:1] = [left[0][taken:]] if taken < len(left[0]) else []
    return left
