"""Which process has a machine's name, as the kernel knows it: by the lock that it holds.

Everything here raises `RuntimeDirectoryUnusable` where that directory is not this user's alone.
"""

from __future__ import annotations

import fcntl
import os
import signal
from contextlib import suppress
from pathlib import Path

from kvmmig.cli import rundir


def holder(name: str) -> int | None:
    """The process that has a machine's name; None where nobody has, or none that can be seen from here."""
    with suppress(OSError):
        lock = rundir.open_lock(name)
        try:
            found = os.fstat(lock)
        finally:
            os.close(lock)
        wanted = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
        for line in Path("/proc/locks").read_text().splitlines():
            fields = line.split()
            # 1: FLOCK  ADVISORY  WRITE 4711 00:1b:42 0 EOF; who waits for one has an arrow before it
            if fields[1:2] == ["FLOCK"] and fields[3:4] == ["WRITE"] and fields[5:6] == [wanted]:
                pid = int(fields[4])
                return pid if pid > 0 else None
    return None


def is_free(name: str) -> bool:
    """Whether no process has a machine's name, also none that can't be seen from here."""
    with suppress(FileNotFoundError):
        lock = rundir.open_lock(name)
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        finally:
            os.close(lock)
    return True


def send_signal(name: str, number: signal.Signals) -> int | None:
    """Send the holder a signal; the process that got it. Whoever has its number later gets none."""
    pid = holder(name)
    if pid is None:
        return None
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    try:
        if holder(name) != pid:  # it has ended meanwhile, and the number may be another's
            return None
        signal.pidfd_send_signal(process, number)
    except ProcessLookupError:
        return None
    finally:
        os.close(process)
    return pid
