"""The host's load, which changes while a guest is saved: ``load.py PARENT DIRECTORY NAME=SECONDS...``.

Prints a line when a part begins: its name, and the time. ``calm``: nothing. ``disk``: two processes write to
the disk with O_DIRECT. ``cpu``: a busy loop for each CPU. Begins anew behind the last one.
"""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import time


def spin(parent: int) -> None:
    while os.getppid() == parent:
        pass


def write(parent: int, directory: str) -> None:
    block = mmap.mmap(-1, 4 << 20)
    fd = os.open(directory, os.O_WRONLY | os.O_TMPFILE | os.O_DIRECT, 0o600)
    while os.getppid() == parent:
        for offset in range(0, 64 << 20, len(block)):
            os.pwrite(fd, block, offset)


def main(parent: int, directory: str, parts: list[str]) -> None:
    while os.getppid() == parent:
        for part in parts:
            name, seconds = part.split("=")
            words = {
                "calm": [],
                "disk": [["write", directory]] * 2,
                "cpu": [["spin"]] * (os.cpu_count() or 1),
            }
            command = [sys.executable, "-I", "-S", __file__]
            busy = [subprocess.Popen([*command, *more, str(os.getpid())]) for more in words[name]]
            print(name, time.perf_counter(), flush=True)
            end = time.perf_counter() + float(seconds)
            while time.perf_counter() < end and os.getppid() == parent:
                time.sleep(0.05)
            for process in busy:
                process.kill()
                process.wait()


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["spin", parent]:
            spin(int(parent))
        case ["write", directory, parent]:
            write(int(parent), directory)
        case [parent, directory, *parts]:
            main(int(parent), directory, parts)
