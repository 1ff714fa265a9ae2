"""A file that is written, or read, in large blocks by threads.

A regular file never says "try again later" and can't be polled, so nothing here touches the disk on the
event loop. What is sent makes up large aligned blocks; a few threads copy them together and write the full
ones with O_DIRECT, with a bounded number in flight; a sender waits for a free block before any byte of it is
accepted. Reading is the same, the other way round: the threads read ahead.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Self

import numpy as np
import trio

from kvmmig.errors import ChannelBroken, ChannelClosed
from kvmmig.transport.contract import ReceiveChannel, SendChannel
from kvmmig.transport.toolkit.one_at_a_time import OneAtATime
from kvmmig.transport.toolkit.savefile import Replace, SavedFile, SaveFile
from kvmmig.transport.toolkit.words import why
from kvmmig.transport.toolkit.workers import Workers, open_in_thread
from kvmmig.units import format_size

_BLOCK = 4 << 20  # a disk's full speed; with 4 KiB at a time O_DIRECT reaches a fortieth of it
_BLOCKS = 5  # one in each thread, one ready for whichever is done first, one being filled
_THREADS = 3  # each copies as long as it writes, or less
_MOST_BYTES = 1 << 20  # copied in one call, on the event loop: about 0.1 ms
_LARGE = 1 << 16  # what is larger is left where it is, and copied by a thread
#: So much is written before the disk is asked to have it for good, while more is being written: what is left
#: for `BlockFileSender.flush`, when the guest stands still, is no more than about that.
_SYNC_EVERY = 64 << 20
_ALIGNMENT = 4096  # of O_DIRECT's addresses, offsets and lengths, on every common disk


@dataclass(slots=True)
class _Filling:
    """A block that is being made up: of bytes that are in it, and of buffers that are yet to be copied."""

    block: memoryview
    size: int = 0
    waiting: list[tuple[int, memoryview]] = field(default_factory=list)  # where in the block, and what

    def take(self, buffers: Sequence[memoryview]) -> int:
        """Take a prefix of ``buffers``, as much as one call may, and say how many bytes."""
        start, copied = self.size, 0
        for buffer in buffers:
            part = buffer[: _BLOCK - self.size]
            if len(part) > _LARGE:
                self.waiting.append((self.size, part))
            else:
                self.block[self.size : self.size + len(part)] = part
                copied += len(part)
            self.size += len(part)
            if self.size == _BLOCK or copied > _MOST_BYTES:
                break
        return self.size - start

    def gather(self) -> None:
        """Copy what is yet to be copied. For a thread: numpy lets go of the GIL meanwhile."""
        target = np.frombuffer(self.block, np.uint8)
        while self.waiting:
            at, part = self.waiting[-1]
            np.copyto(target[at : at + len(part)], np.frombuffer(part, np.uint8))
            self.waiting.pop()


class BlockFileSender(SendChannel):
    """Saves into a `SaveFile`; for a transport that stores.

    Durable: what `flush` has returned for survives a power cut, though it gets its name only by `aclose`.
    A write that fails is reported by the next call. `abort` leaves a thread that is stuck in a dead disk
    alone; it closes the file when it comes back. A cancel that comes when `aclose` has already begun to
    rename is too late: the file appears, whole.
    """

    @classmethod
    async def open(cls, path: str, *, direct: bool, replace: Replace = Replace.SEEN) -> Self:
        """What is at ``path`` stays as it is until `aclose`.

        Raises `ConnectFailed`; a cancel leaves nothing.
        """

        def make() -> tuple[SaveFile, list[memoryview]]:
            blocks = _blocks()
            return SaveFile.create(path, direct=direct, replace=replace), blocks

        return cls(*await open_in_thread(make, lambda made: made[0].close()))

    def __init__(self, save: SaveFile, blocks: list[memoryview]) -> None:
        """Takes over ``save``, an empty file, and ``blocks`` to collect bytes in. See `open`."""
        self.peer = save.path
        self.notices = save.notices
        self._save = save
        self._workers = Workers(f"write {save.path}", _THREADS + 1, save.close)  # one may wait for the disk
        self._sending = OneAtATime("sending")
        self._free = blocks
        self._current: _Filling | None = None  # its bytes belong at _offset
        self._offset = 0
        self._in_flight = 0
        self._hindrance = ""  # when it was aborted
        self._moved_at = 0.0  # when the first call in flight was begun, or the last one ended
        self._syncing = False  # a thread is writing the current block, so nothing may be added to it
        self._unsynced = False
        self._written = 0
        self._behind = 0  # bytes written since the last sync began
        self._syncing_behind = False
        self._error: Exception | None = None
        self._closed = False
        self._progress = trio.lowlevel.ParkingLot()

    async def send_some(self, buffers: Sequence[memoryview]) -> int:
        with self._sending:
            await trio.lowlevel.checkpoint()
            self._check()
            while self._syncing or (self._current is None and not self._free):
                await self._progress.park()
                self._check()
            # Nothing from here on waits, so a cancel can only come while nothing has been accepted.
            return self._take(buffers)

    async def flush(self) -> None:
        """Return when every accepted byte is on the disk. Counts as sending: not both at a time."""
        with self._sending:
            await trio.lowlevel.checkpoint()
            await self._idle()
            if self._unsynced:
                self._syncing = True
                self._submit(partial(self._sync, self._current, self._offset), self._synced)
                await self._idle()

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
        if self._closed or not self._in_flight:
            return self._hindrance
        return f"the disk has not answered for {trio.current_time() - self._moved_at:.1f} s"

    def _take(self, buffers: Sequence[memoryview]) -> int:
        filling = self._current = self._current or _Filling(self._free.pop())
        count = filling.take(buffers)
        self._unsynced = True
        if filling.size == _BLOCK:
            done = partial(self._block_written, filling.block)
            self._submit(partial(self._write_block, filling, self._offset), done)
            self._current = None
            self._offset += _BLOCK
        return count

    def _submit(self, call: Callable[[], object], then: Callable[[], None] = lambda: None) -> None:
        def done(error: Exception | None) -> None:
            self._in_flight -= 1
            self._moved_at = trio.current_time()
            if error is None:
                then()
            else:
                self._error = self._error or error
            self._progress.unpark_all()

        if not self._in_flight:
            self._moved_at = trio.current_time()
        self._in_flight += 1
        self._workers.submit(call, done)

    def _block_written(self, block: memoryview) -> None:
        self._written += _BLOCK
        self._free.append(block)
        self._behind += _BLOCK
        if self._behind >= _SYNC_EVERY and not self._syncing_behind:
            self._behind, self._syncing_behind = 0, True
            self._submit(partial(os.fdatasync, self._save.fd), self._synced_behind)

    def _synced_behind(self) -> None:
        self._syncing_behind = False

    def _synced(self) -> None:
        self._syncing = False
        self._unsynced = False

    async def _idle(self) -> None:
        self._check()
        while self._in_flight:
            await self._progress.park()
            self._check()

    def _check(self) -> None:
        if self._closed:
            raise ChannelClosed(f"{self.peer} was closed by this side")
        if self._error:
            raise ChannelBroken(
                f"can't write {self.peer}: {why(self._error)} (after {format_size(self._written)})"
            ) from self._error

    # The threads run these.

    def _write_block(self, filling: _Filling, offset: int) -> None:
        filling.gather()
        self._write(filling.block, offset)

    def _write(self, data: memoryview, offset: int) -> None:
        while data:
            count = os.pwrite(self._save.fd, data, offset)
            data = data[count:]
            offset += count

    def _sync(self, filling: _Filling | None, offset: int) -> None:
        """Write the block that is not full as it is. It is written again when it has filled up."""
        if filling is not None and filling.size:
            filling.gather()
            size = filling.size
            end = -(-size // _ALIGNMENT) * _ALIGNMENT if self._save.direct else size
            filling.block[size:end] = bytes(end - size)
            self._write(filling.block[:end], offset)
            os.ftruncate(self._save.fd, offset + size)
        os.fdatasync(self._save.fd)


@dataclass
class _Piece:
    """A part of the file, read ahead into a block, or still on its way."""

    block: memoryview
    size: int
    ready: bool = False


class BlockFileReceiver(ReceiveChannel):
    """Reads a saved file from its beginning."""

    @classmethod
    async def open(cls, path: str, *, direct: bool) -> Self:
        """Raises `ConnectFailed`; a cancel leaves nothing."""

        return cls(await open_in_thread(partial(SavedFile, path, direct=direct), SavedFile.close))

    def __init__(self, saved: SavedFile) -> None:
        """Takes over ``saved``. See `open`."""
        self.peer = saved.path
        self.notices = saved.notices
        self._saved = saved
        self.file = saved.fd
        self._workers = Workers(f"read {saved.path}", _THREADS, saved.close)
        self._receiving = OneAtATime("receiving")
        self._pieces: deque[_Piece] = deque()  # in the file's order
        self._taken = 0  # of the first piece
        self._offset = 0  # of the next piece
        self._error: Exception | None = None
        self._closed = False
        self._progress = trio.lowlevel.ParkingLot()
        self._begun = False  # who maps the file reads nothing here

    async def receive_some(self, buffer: memoryview) -> int:
        with self._receiving:
            await trio.lowlevel.checkpoint()
            self._check()
            if not self._begun:
                blocks = await trio.to_thread.run_sync(_blocks, limiter=trio.CapacityLimiter(1))
                self._begun = True
                self._check()
                for block in blocks:
                    self._read_ahead(block)
            while self._pieces and not self._pieces[0].ready:
                await self._progress.park()
                self._check()
            if not self._pieces:
                return 0
            piece = self._pieces[0]
            size = min(len(buffer), piece.size - self._taken, _MOST_BYTES)
            buffer[:size] = piece.block[self._taken : self._taken + size]
            self._taken += size
            if self._taken == piece.size:
                self._taken = 0
                self._pieces.popleft()
                self._read_ahead(piece.block)
            return size

    def abort(self) -> None:
        if not self._closed:
            self._closed = True
            self._workers.stop()
            self._progress.unpark_all()

    async def aclose(self) -> None:
        self.abort()
        await trio.lowlevel.checkpoint()

    def _read_ahead(self, block: memoryview) -> None:
        size = min(_BLOCK, self._saved.size - self._offset)
        if size <= 0:
            return
        piece = _Piece(block, size)

        def done(error: Exception | None) -> None:
            piece.ready = True
            self._error = self._error or error
            self._progress.unpark_all()

        self._pieces.append(piece)
        self._workers.submit(partial(self._read, block, size, self._offset), done)
        self._offset += size

    def _check(self) -> None:
        if self._closed:
            raise ChannelClosed(f"{self.peer} was closed by this side")
        if self._error:
            raise ChannelBroken(f"can't read {self.peer}: {why(self._error)}") from self._error

    def _read(self, block: memoryview, size: int, offset: int) -> None:
        """Runs in a thread."""
        done = 0
        while done < size:
            # O_DIRECT wants an aligned length, also where the file ends before it.
            count = os.preadv(self._saved.fd, [block[done:]], offset + done)
            if count == 0:
                raise OSError("it became shorter while it was being read")  # no number: its words are ours
            done += count


def _blocks() -> list[memoryview]:
    """Page-aligned blocks, already backed by memory, so that filling them never waits for the kernel."""
    pool = mmap.mmap(-1, _BLOCK * _BLOCKS, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        pool.madvise(mmap.MADV_HUGEPAGE)
    with open("/dev/zero", "rb", buffering=0) as zeros:  # touches every page without holding the GIL
        zeros.readinto(pool)
    view = memoryview(pool)
    return [view[start : start + _BLOCK] for start in range(0, len(view), _BLOCK)]
