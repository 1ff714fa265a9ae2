"""Two network namespaces joined by one cable, which can be cut. Nothing outside is ever reached.

This process moves into the first one for good, the other sides live in the second. Both have no name, so
they are gone with the last process in them, however it ends.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

_CLONE_NEWNS, _CLONE_NEWNET = 0x20000, 0x40000000

HERE, THERE = "10.99.0.1", "10.99.0.2"
#: Small buffers, so that a slow or dead receiver is felt after some 200 KiB.
_BUFFERS = "4096 65536 131072"


def move_into_own_namespaces() -> str:
    """Leave the host's network and mounts; returns why that can't be, empty if it was.

    To be called before there are threads.
    """
    missing = [name for name in ("ip", "nsenter", "unshare", "mount") if shutil.which(name) is None]
    if missing:
        return f"needs the program {missing[0]}"
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS | _CLONE_NEWNET) != 0:
        return f"needs root, to have namespaces of its own ({os.strerror(ctypes.get_errno())})"
    _run("mount", "--make-rprivate", "/")
    _run("ip", "link", "set", "lo", "up")
    return ""


class Cable:
    """The two ends. ``enter`` is what a command line needs in front to run at the other end."""

    def __init__(self, holder: int) -> None:
        self.enter = ["nsenter", f"--net=/proc/{holder}/ns/net"]

    @classmethod
    @contextmanager
    def plugged_in(cls) -> Iterator[Cable]:
        """For a process that has moved into its own namespaces."""
        command = ["unshare", "--net", "sh", "-c", "echo; exec sleep infinity"]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
            try:
                assert holder.stdout is not None
                holder.stdout.readline()
                cable = cls(holder.pid)
                _run("ip", "link", "add", "here", "type", "veth", "peer", "name", "there")
                _run("ip", "link", "set", "there", "netns", str(holder.pid))
                for enter, name, address in (([], "here", HERE), (cable.enter, "there", THERE)):
                    _run(*enter, "ip", "address", "add", f"{address}/24", "dev", name)
                    _run(*enter, "ip", "link", "set", name, "up")
                    for setting in ("tcp_rmem", "tcp_wmem"):
                        path = f"/proc/sys/net/ipv4/{setting}"
                        _run(*enter, "sh", "-c", f"echo {_BUFFERS} > {path}")
                yield cable
            finally:
                holder.kill()

    def cut(self) -> None:
        """Nothing gets through any more, in either direction, and nobody is told."""
        _run(*self.enter, "ip", "link", "set", "there", "down")

    def mend(self) -> None:
        """Idempotent."""
        _run(*self.enter, "ip", "link", "set", "there", "up")


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
