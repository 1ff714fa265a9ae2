"""Saves of a fake guest, killed at random moments: ``python -m tests.image.killed DIRECTORY TIMES SEED``.

Each saver is a fork of this process, so that killing 200 of them takes seconds. After each kill the file
under the name must be one whole image, of one save.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np
import trio

from kvmmig.image.format import MEMORY_AT, PAGE_SIZE
from kvmmig.image.reading import open_image, reader, stored_parts
from kvmmig.migration.outgoing import OutgoingMigration
from kvmmig.migration.policy import MaxRounds
from kvmmig.testing.machine import FakeMachine

_SIZE = 8 << 20
_PAGES = _SIZE // PAGE_SIZE
_ZEROS = range(100, 400)


def save(path: Path, number: int) -> None:
    """Save a guest all of whose pages say ``number``, but for those that are zero."""

    async def main() -> None:
        machine = FakeMachine(_SIZE)
        machine.memory.words[:] = number
        machine.memory.words[_ZEROS.start : _ZEROS.stop] = 0
        await OutgoingMigration(machine, f"file:{path}", policy=MaxRounds(2), keep_running=True).run()

    trio.run(main)


def _saver(path: Path, number: int) -> int:
    """A process that saves; its id."""
    child = os.fork()
    if child == 0:
        save(path, number)
        os._exit(0)
    return child


def check(path: Path) -> int:
    """The number that all pages of the image say; it is verified first."""
    fd = os.open(path, os.O_RDONLY)
    try:
        opened = open_image(fd)
        assert list(opened.verify(reader(fd), stored_parts(fd))) == []
        data = reader(fd)(MEMORY_AT, _SIZE)
    finally:
        os.close(fd)
    words = np.frombuffer(data, np.uint64).reshape(_PAGES, -1)
    numbers = np.unique(np.delete(words, list(_ZEROS), axis=0))
    assert len(numbers) == 1, numbers
    assert not words[_ZEROS.start : _ZEROS.stop].any()
    return int(numbers[0])


def main(directory: Path, times: int, seed: int) -> None:
    path, chance = directory / "a.img", random.Random(seed)
    begin = time.perf_counter()
    os.waitpid(_saver(path, 1), 0)
    longest = 1.2 * (time.perf_counter() - begin)
    number, unfinished = 1, 0
    for _ in range(times):
        child = _saver(path, number + 1)
        time.sleep(chance.random() * longest)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        unfinished += os.WIFSIGNALED(status)
        found = check(path)
        assert found in (number, number + 1), (found, number)
        number = found
    os.waitpid(_saver(path, number + 1), 0)
    assert os.listdir(directory) == ["a.img"], "the next save removes what killed ones have left"
    print(
        f"{times} saves were killed, {unfinished} of them before their end; the last image is number {number}"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
