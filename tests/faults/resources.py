"""What this process has and holds, to see whether a migration has left anything behind."""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections import Counter
from dataclasses import dataclass

# An idle worker of trio's; a busy one is called after what it does.
_IDLE = re.compile(r"Trio thread \d+")


@dataclass(frozen=True)
class Resources:
    """Processes, threads and file descriptors, each by what it is."""

    processes: Counter[str]
    threads: Counter[str]
    fds: Counter[str]

    @classmethod
    def now(cls) -> Resources:
        """As it is at this moment."""
        return cls(
            Counter(f"{pid} {name}" for pid, name in descendants(os.getpid()).items()),
            Counter(one.name for one in threading.enumerate() if not _IDLE.fullmatch(one.name)),
            Counter(_fds()),
        )

    def added_since(self, before: Resources) -> tuple[str, ...]:
        """What is here and was not, as sentences."""
        found = []
        for kind, mine, earlier in (
            ("the process", self.processes, before.processes),
            ("the thread", self.threads, before.threads),
            ("the file descriptor of", self.fds, before.fds),
        ):
            found += [f"{kind} {name!r} is left" for name in (mine - earlier)]
        return tuple(found)


def descendants(pid: int) -> dict[int, str]:
    """All processes that ``pid`` has started, and those that they have: their numbers and names."""
    parents: dict[int, tuple[int, str]] = {}
    for entry in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{entry}/stat") as stat:
            name, _, rest = stat.read().partition("(")[2].rpartition(")")
            parents[int(entry)] = int(rest.split()[1]), name
    found: dict[int, str] = {}
    front = {pid}
    while front:
        front = {child for child, (parent, _) in parents.items() if parent in front}
        found |= {child: parents[child][1] for child in front}
    return found


def _fds() -> list[str]:
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the one that lists them is gone already
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
    return found
