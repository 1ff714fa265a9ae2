"""What a channel could leave behind: file descriptors, and child processes. Compare before and after."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


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
