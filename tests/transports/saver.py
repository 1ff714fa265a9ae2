"""Another process that saves for ever, to be killed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

_SAVER = """
import sys, trio
from kvmmig.transport import TransportURI, transport_for

async def main():
    async with transport_for(TransportURI.parse(sys.argv[1])).connect() as channel:
        await channel.send_some([memoryview(bytes(1 << 18))])
        print("saving", flush=True)
        while True:
            await channel.send_some([memoryview(bytes(1 << 18))])
            await trio.sleep(0.01)

trio.run(main)
"""

#: A whole save, of so many pieces.
_SAVE = """
import sys, trio
from kvmmig.transport import TransportURI, transport_for

async def main():
    print("saving", flush=True)
    async with transport_for(TransportURI.parse(sys.argv[1])).connect() as channel:
        for number in range(int(sys.argv[2])):
            rest = bytes([number]) * (1 << 18)
            while rest:
                rest = rest[await channel.send_some([memoryview(rest)]):]

trio.run(main)
"""

#: For a file system that has no unnamed files.
_NAMED = """
import os
real = os.open
def refusing(path, flags, mode=0o777, *, dir_fd=None):
    if flags & os.O_TMPFILE == os.O_TMPFILE:
        raise OSError(95, "")
    return real(path, flags, mode, dir_fd=dir_fd)
os.open = refusing
"""


def saved(pieces: int) -> bytes:
    """What `save_and_be_killed` saves."""
    return b"".join(bytes([number]) * (1 << 18) for number in range(pieces))


def save_and_be_killed(uri: str, pieces: int, *, after: float, named: bool, at: str = "") -> bool:
    """Another process saves, and is killed ``after`` so many seconds; whether it came to its end before.

    ``at`` is a system call and a number, ``linkat:2``: it is killed as it makes that one.
    """
    program = (_NAMED if named else "") + _SAVE
    command = [sys.executable, "-c", program, uri, str(pieces)]
    if at:
        strace = shutil.which("strace")
        if strace is None:
            pytest.skip("needs strace")
        call, when = at.split(":")
        injection = f"inject={call}:signal=KILL:when={when}"
        command = [strace, "-f", "-qq", "-o", os.devnull, "-e", f"trace={call}", "-e", injection, *command]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "saving\n"
        try:
            return process.wait(after) == 0
        except subprocess.TimeoutExpired:
            process.kill()
            return False


@contextmanager
def other_saver(uri: str, *, named: bool = False) -> Iterator[subprocess.Popen[str]]:
    """It has sent a part of its guest; killed at the end of the block.

    ``named``: as if no file there could be without a name.
    """
    program = (_NAMED if named else "") + _SAVER
    with subprocess.Popen([sys.executable, "-c", program, uri], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "saving\n"
            yield process
        finally:
            process.kill()
