"""Lanes: a thread of its own copies what goes through a descriptor; the event loop only decides.

The calls are few and large, and the thread holds no GIL while it copies. It needs no answer from the loop to
keep going: what is accepted waits in a queue that lasts for some milliseconds at the rate at which it is
taken. So a loop that waits for a CPU on a busy host does not hold the bytes up.

`SendLane` and `ReceiveLane` are the mechanism: they raise `OSError` and `ChannelClosed`. What an error means
depends on who is at the other end, so the channels over them say it.
"""

from __future__ import annotations

import contextlib
import os
import select
from collections.abc import Callable, Sequence
from functools import partial
from time import perf_counter
from typing import TypeAlias

import trio

from kvmmig.errors import ChannelClosed
from kvmmig.transport.toolkit.buffers import prefix
from kvmmig.transport.toolkit.workers import Workers

#: What the queue of a `SendLane` is to last for, in seconds: longer than a busy host keeps a loop waiting.
_AHEAD = 0.03
#: Bytes that may wait in it all the same, however slow the lane is; and at most, however fast.
_LEAST, _MOST = 1 << 19, 32 << 20
#: The queue is at most this fraction of all that has been sent.
_TELLING = 8
#: How much of what was known of the rate still counts after one more piece.
_FADE = 0.9
#: Bytes of one call of the system: a copy of a millisecond or two, which a cancel waits for.
_CALL = 4 << 20
#: Bytes that a `SendLane` takes at a time: each is a turn of the event loop.
_PIECE = 16 << 20
#: Milliseconds for which a `ReceiveLane` that has something waits for more of it: what comes in bulk is worth
#: more of them than a short message.
_LINGER, _LINGER_IN_BULK = 1, 10
#: As much is bulk.
_BULK = 1 << 18

#: Makes of a piece's length what goes before the piece.
Head: TypeAlias = Callable[[int], bytes]


class Lane:
    """A descriptor, which must be non-blocking, and the thread that alone uses it.

    The thread closes it: nobody else could without it being used once more, under a number that by then is
    somebody else's file. It calls ``at_end`` right afterwards.
    """

    def __init__(self, fd: int, peer: str, at_end: Callable[[], None]) -> None:
        self.fd = fd
        self.stopping = False
        self.closed = trio.Event()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        token = trio.lowlevel.current_trio_token()

        def end() -> None:
            os.close(fd)
            os.close(self._wake)
            at_end()
            with contextlib.suppress(trio.RunFinishedError):
                token.run_sync_soon(self.closed.set)

        self._workers = Workers(f"lane to {peer}", 1, end)
        self.submit = self._workers.submit

    def stop(self) -> None:
        """Have the thread close the descriptor, as soon as it is out of what it is in. Idempotent."""
        if not self.stopping:
            self.stopping = True
            os.eventfd_write(self._wake, 1)
            self._workers.stop()

    def interrupt(self) -> None:
        """Have the thread return from `ready`. To be called before `stop`."""
        if not self.stopping:
            os.eventfd_write(self._wake, 1)

    def ready(self, event: int, others: Sequence[int] = (), timeout: int | None = None) -> bool:
        """In the thread: wait until the descriptor is ready, for ``timeout`` ms at most.

        False when it is not: it was interrupted or stopped, or one of ``others`` is ready.
        """
        poll = select.poll()
        poll.register(self.fd, event)
        for fd in (self._wake, *others):
            poll.register(fd, select.POLLIN)
        ready = {fd for fd, _ in poll.poll(timeout)}
        if self._wake in ready and not self.stopping:
            os.eventfd_read(self._wake)
        return self.fd in ready and not self.stopping and not ready.intersection(others)


class SendLane:
    """The sending direction. Takes over ``fd``, as `Lane` does.

    What is accepted waits for the thread; it is not copied before. One task at a time may use it. An
    `OSError` of the thread's is raised by the next call, and by each one after it.
    """

    def __init__(
        self,
        fd: int,
        peer: str,
        *,
        first: int = 1 << 19,
        reader: int | None = None,
        at_end: Callable[[], None] = lambda: None,
    ) -> None:
        """``first`` is how many bytes may wait for the thread while nothing is known of the rate.

        ``reader`` is a pidfd: when that process ends, nobody takes anything any more. ``at_end`` is called by
        the thread when it has closed the descriptor.
        """
        self._peer = peer
        self._reader = [] if reader is None else [reader]
        self.lane = Lane(fd, peer, at_end)
        self._progress = trio.lowlevel.ParkingLot()
        self._first = self._most = first
        # As the thread has seen it: bytes and seconds of late, and all bytes.
        self._bytes = self._seconds = self._total = 0.0
        self._queued = 0
        self._error: Exception | None = None
        self._aborted = False

    @property
    def idle(self) -> bool:
        """All that was accepted is with the kernel."""
        return not self._queued

    async def send_some(
        self, buffers: Sequence[memoryview], piece: int = _PIECE, head: Head | None = None
    ) -> int:
        """As `SendChannel.send_some`; at most ``piece`` bytes at a time, behind what ``head`` says of it."""
        await trio.lowlevel.checkpoint()
        while not (size := self.send_at_once(buffers, piece, head)):
            await self._progress.park()
        return size

    def send_at_once(
        self, buffers: Sequence[memoryview], piece: int = _PIECE, head: Head | None = None
    ) -> int:
        """As `send_some`, but 0 where there is no room; it does not wait."""
        self.check()
        if self._queued > self._most - min(self._most // 2, sum(len(buffer) for buffer in buffers)):
            return 0  # half of the queue goes before more is taken: many small pieces cost more than a few
        part = prefix(buffers, min(piece, self._most - self._queued))
        size = sum(len(buffer) for buffer in part)
        self._queued += size
        if head is not None:
            part.insert(0, memoryview(head(size)))
        self.lane.submit(partial(self._write, part, size), partial(self._written, size))
        return size

    async def wait_idle(self) -> None:
        """Wait until the kernel has all that was accepted."""
        self.check()
        while self._queued:
            await self._progress.park()
            self.check()

    async def in_thread(self, call: Callable[[], object]) -> None:
        """Have the thread call ``call``; its error is the lane's."""
        told = trio.Event()

        def done(error: Exception | None) -> None:
            told.set()
            self._written(0, error)

        self.lane.submit(call, done)
        while not told.is_set():
            await self._progress.park()
            self.check()

    async def end(self) -> None:
        """Returns when the descriptor is closed. To be called when the lane is idle."""
        self.lane.stop()
        await self.lane.closed.wait()
        self.check()

    def abort(self) -> None:
        """Close it at once. Who waits gets `ChannelClosed`. Idempotent."""
        self._aborted = True
        self.lane.stop()
        self._progress.unpark_all()

    def check(self) -> None:
        """Raise what the thread has failed with; `ChannelClosed` after `abort`."""
        if self._aborted:
            raise ChannelClosed(f"{self._peer} was closed by this side")
        if self._error:
            raise self._error

    def _written(self, size: int, error: Exception | None) -> None:
        self._queued -= size
        # What goes fast at first goes into buffers of the kernel's: that says nothing yet.
        most = min(max(self._total / _TELLING, self._first), _MOST)
        self._most = int(min(max(self._bytes / max(self._seconds, 1e-6) * _AHEAD, _LEAST), most))
        self._error = self._error or error
        self._progress.unpark_all()

    def _goes_on(self) -> bool:
        return not self._error and not self.lane.stopping

    def _write(self, buffers: list[memoryview], size: int) -> None:
        """Runs in the thread."""
        begin = perf_counter()
        while buffers and self._goes_on():
            try:
                count = os.writev(self.lane.fd, prefix(buffers, _CALL))
            except BlockingIOError:
                # A full pipe is not enough to wait for: a dead process's child may hold its other end open.
                if not self.lane.ready(select.POLLOUT, self._reader):
                    if self._goes_on():
                        raise BrokenPipeError from None
                    return
                continue
            while count:
                if count < len(buffers[0]):
                    buffers[0] = buffers[0][count:]
                    break
                count -= len(buffers.pop(0))
        self._bytes = self._bytes * _FADE + size
        self._seconds = self._seconds * _FADE + perf_counter() - begin
        self._total += size


class _Fill:
    """One buffer that is being filled: the thread writes, and the loop reads when it is done."""

    def __init__(self, buffer: memoryview) -> None:
        self.buffer = buffer
        self.count = 0
        self.cancelled = False
        self.error: Exception | None = None
        self.done = trio.Event()

    def finish(self, error: Exception | None) -> None:
        self.error = error
        self.done.set()


class ReceiveLane:
    """The receiving direction. Takes over ``fd``, as `Lane` does. One task at a time may use it."""

    def __init__(self, fd: int, peer: str, *, at_end: Callable[[], None] = lambda: None) -> None:
        self._peer = peer
        self._lane = Lane(fd, peer, at_end)
        self._fill: _Fill | None = None
        self._error: Exception | None = None  # one that came behind bytes: the kernel tells it only once
        self._aborted = False

    async def receive_some(self, buffer: memoryview) -> int:
        """As `ReceiveChannel.receive_some`: much of it, or what is there.

        A cancel stops the thread after the call that it is in. Where that has taken anything, this returns
        it, and the next checkpoint is cancelled.
        """
        if self._aborted:  # the thread takes no more calls
            raise ChannelClosed(f"{self._peer} was closed by this side")
        if self._error is not None:
            raise self._error
        self._fill = fill = _Fill(buffer)
        self._lane.submit(partial(self._run, fill), fill.finish)
        try:
            await fill.done.wait()
        except trio.Cancelled:
            fill.cancelled = True
            self._lane.interrupt()
            with trio.CancelScope(shield=True):
                await fill.done.wait()
            if not fill.count:
                raise
        if self._aborted:
            raise ChannelClosed(f"{self._peer} was closed by this side")
        if fill.error is not None:
            if not fill.count:
                raise fill.error
            self._error = fill.error
        return fill.count

    async def end(self) -> None:
        """As `abort`; returns when the descriptor is closed."""
        self.abort()  # a call that the thread has not begun is forgotten: whoever waits for it must be told
        await self._lane.closed.wait()

    def abort(self) -> None:
        """Close it at once. Who waits gets `ChannelClosed`. Idempotent."""
        self._aborted = True
        self._lane.stop()
        if self._fill is not None:
            self._fill.done.set()

    def _run(self, fill: _Fill) -> None:
        """Runs in the thread."""
        size = len(fill.buffer)
        while fill.count < size and not fill.cancelled and not self._lane.stopping:
            try:
                count = os.readv(self._lane.fd, [fill.buffer[fill.count : fill.count + _CALL]])
            except BlockingIOError:
                linger = _LINGER_IN_BULK if fill.count >= _BULK else _LINGER if fill.count else None
                if not self._lane.ready(select.POLLIN, timeout=linger) and fill.count:
                    return
                continue
            if not count:
                return  # the end; behind bytes it is told once more
            fill.count += count
