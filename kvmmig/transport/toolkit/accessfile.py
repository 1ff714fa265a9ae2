"""A new file that is written at any offset, by threads, straight from the buffers that are accepted.

Nothing is copied: with O_DIRECT the disk reads guest memory itself. So a block that is large costs no CPU
time, and what is accepted is as quick as putting it into a queue.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Self

import numpy as np
import trio

from kvmmig.errors import ChannelBroken, ChannelClosed
from kvmmig.transport.contract import RandomAccessChannel
from kvmmig.transport.toolkit.one_at_a_time import OneAtATime
from kvmmig.transport.toolkit.savefile import Replace, SaveFile
from kvmmig.transport.toolkit.words import why
from kvmmig.transport.toolkit.workers import Workers, open_in_thread
from kvmmig.units import format_size

_Pieces = Sequence[tuple[int, memoryview]]

_THREADS = 3  # a disk is at its full speed with two or three writes in flight
_CALL = 4 << 20  # the most bytes of one write
_IN_FLIGHT = 64 << 20  # bytes that have been accepted and not yet written
_ALIGNMENT = 4096  # of O_DIRECT's addresses, on every common disk
#: So much is written before the disk is asked to have it for good, while more is being written: what is left
#: for `flush` is no more than about that.
_SYNC_EVERY = 256 << 20


class RandomAccessFile(RandomAccessChannel):
    """Writes a `SaveFile`; for a transport that stores.

    Durable: what `flush` has returned for survives a power cut, though it gets its name only by `aclose`. A
    write that fails is reported by the next call. `abort` leaves a thread that is stuck in a dead disk alone;
    it closes the file when it comes back. A cancel that comes when `aclose` has already begun to rename is
    too late: the file appears, whole.
    """

    @classmethod
    async def open(cls, path: str, *, direct: bool, replace: Replace = Replace.SEEN) -> Self:
        """What is at ``path`` stays as it is until `aclose`.

        Raises `ConnectFailed`; a cancel leaves nothing.
        """
        create = partial(SaveFile.create, path, direct=direct, replace=replace)
        return cls(await open_in_thread(create, SaveFile.close))

    def __init__(self, save: SaveFile) -> None:
        """Takes over ``save``, an empty file. See `open`."""
        self.peer = save.path
        self.notices = save.notices
        self._save = save
        self._workers = Workers(f"write {save.path}", _THREADS + 1, save.close)  # one may wait for the disk
        self._using = OneAtATime("writing")
        self._jobs = 0  # that have not ended
        self._in_flight = 0  # their bytes
        self._moved_at = 0.0  # when the first of them was begun, or the last one ended
        self._written = self._behind = 0  # bytes in all, and since the last sync began
        self._syncing_behind = False
        self._unsynced = False
        self._hindrance = ""  # when it was aborted
        self._error: Exception | None = None
        self._closed = False
        self._progress = trio.lowlevel.ParkingLot()

    async def write_some(self, pieces: _Pieces) -> int:
        with self._using:
            await trio.lowlevel.checkpoint()
            self._check()
            while self._in_flight >= _IN_FLIGHT:
                await self._progress.park()
                self._check()
            # Nothing from here on waits, so a cancel can only come while nothing has been accepted.
            return self._take(pieces)

    async def settle(self) -> None:
        with self._using:
            await trio.lowlevel.checkpoint()
            await self._idle()

    async def flush(self) -> None:
        """Return when every accepted byte is on the disk."""
        with self._using:
            await trio.lowlevel.checkpoint()
            await self._idle()
            if self._unsynced:
                self._submit(partial(os.fdatasync, self._save.fd))
                await self._idle()
                self._unsynced = False

    def abort(self) -> None:
        if not self._closed:
            self._hindrance = self.waits_for()
            self._closed = True
            self._save.give_up()
            self._workers.stop()
            self._progress.unpark_all()

    async def aclose(self) -> None:
        if self._closed:
            await trio.lowlevel.checkpoint()
            return
        try:
            await self.flush()
            self._submit(self._save.publish)
            await self._idle()
        finally:
            self.abort()

    def waits_for(self) -> str:
        if self._closed or not self._jobs:
            return self._hindrance
        return f"the disk has not answered for {trio.current_time() - self._moved_at:.1f} s"

    def _take(self, pieces: _Pieces) -> int:
        room = accepted = _IN_FLIGHT - self._in_flight
        job: list[tuple[int, memoryview]] = []
        size = 0
        for offset, data in pieces:
            data = data[:room]
            room -= len(data)
            while data:
                part = data[: _CALL - size]
                job.append((offset, part))
                offset, data, size = offset + len(part), data[len(part) :], size + len(part)
                if size == _CALL:
                    self._submit_write(job, size)
                    job, size = [], 0
            if not room:
                break
        if job:
            self._submit_write(job, size)
        self._unsynced = True
        return accepted - room

    def _submit_write(self, job: _Pieces, size: int) -> None:
        self._in_flight += size
        self._submit(partial(self._write, job), size)
        self._behind += size
        if self._behind >= _SYNC_EVERY and not self._syncing_behind:
            self._behind, self._syncing_behind = 0, True
            self._submit(partial(os.fdatasync, self._save.fd), then=self._synced_behind)

    def _submit(
        self, call: Callable[[], object], size: int = 0, then: Callable[[], None] = lambda: None
    ) -> None:
        def done(error: Exception | None) -> None:
            self._jobs -= 1
            self._in_flight -= size
            self._moved_at = trio.current_time()
            if error is None:
                self._written += size
                then()
            else:
                self._error = self._error or error
            self._progress.unpark_all()

        if not self._jobs:
            self._moved_at = trio.current_time()
        self._jobs += 1
        self._workers.submit(call, done)

    def _synced_behind(self) -> None:
        self._syncing_behind = False

    async def _idle(self) -> None:
        self._check()
        while self._jobs:
            await self._progress.park()
            self._check()

    def _check(self) -> None:
        if self._closed:
            raise ChannelClosed(f"{self.peer} was closed by this side")
        if self._error:
            raise ChannelBroken(
                f"can't write {self.peer}: {why(self._error)} (after {format_size(self._written)})"
            ) from self._error

    # The threads run this.

    def _write(self, job: _Pieces) -> None:
        for offset, data in job:
            data = _aligned(data) if self._save.direct else data
            while data:
                count = os.pwrite(self._save.fd, data, offset)
                data = data[count:]
                offset += count


def _aligned(data: memoryview) -> memoryview:
    """The same bytes where O_DIRECT takes them; guest memory lies there already."""
    if np.frombuffer(data, np.uint8).ctypes.data % _ALIGNMENT == 0:
        return data
    block = mmap.mmap(-1, len(data), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    block[:] = data
    return memoryview(block)
