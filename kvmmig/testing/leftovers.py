"""What a channel could leave behind: file descriptors, and child processes. Compare before and after."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import trio


def leftovers() -> set[str]:
    """The descriptors that this process has open, and its children, each as a line for people."""
    return _descriptors() | _children()


def _descriptors() -> set[str]:
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the one that lists them
            found.add(f"descriptor {fd} -> {os.readlink(f'/proc/self/fd/{fd}')}")
    return found


def _children() -> set[str]:
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            name, _, fields = stat.read_text().rpartition(")")
            if int(fields.split()[1]) == os.getpid():
                found.add(f"process {name})")
    return found


async def left_after(before: set[str], seconds: float) -> set[str]:
    """What is there beyond ``before`` and has not gone within that time; nothing tells when it has.

    It was seen in one look: a thread that a cancel has left may open a file between two.
    """
    left = leftovers() - before
    with trio.move_on_after(seconds):
        while left:
            await trio.sleep(0.01)
            left = leftovers() - before
    return left
