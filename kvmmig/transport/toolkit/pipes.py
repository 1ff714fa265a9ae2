"""The two ends of a pipe.

A thread of its own writes, or reads, each pipe. Non-blocking calls on the event loop are not good enough: the
kernel has one lock for both ends of a pipe, and whoever copies holds it. A reader that asks for a megabyte at
a time and then loses its CPU, or waits for a page of its own, holds up a "non-blocking" writer for as long.

`PipeWriter` and `PipeReader` are the mechanism: they raise `OSError` and `ChannelClosed`. What an error means
depends on who is at the other end, so the channels over them say it: `PipeSender` and `PipeReceiver` here,
and those over a process in `kvmmig.transport.toolkit.process`.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import select
import termios
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import trio

from kvmmig.errors import ChannelBroken, ChannelClosed
from kvmmig.transport.contract import ReceiveChannel, SendChannel
from kvmmig.transport.toolkit.buffers import prefix
from kvmmig.transport.toolkit.one_at_a_time import OneAtATime
from kvmmig.transport.toolkit.words import why
from kvmmig.transport.toolkit.workers import Workers

#: Bytes of one call: a quarter of the largest pipe.
PIPE_CALL = 1 << 18
#: Bytes that may wait for the thread: as much as it writes meanwhile.
_MOST_QUEUED = 1 << 19
_READ_AHEAD = 2  # pieces


class _PipeThread:
    """A pipe's descriptor, and the thread that alone uses it.

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

        self._workers = Workers(f"pipe of {peer}", 1, end)
        self.submit = self._workers.submit

    def stop(self) -> None:
        """Have the thread close the pipe, as soon as it is out of whatever call it is in. Idempotent."""
        if not self.stopping:
            self.stopping = True
            os.eventfd_write(self._wake, 1)
            self._workers.stop()

    def ready(self, event: int, others: Sequence[int] = ()) -> bool:
        """In the thread: wait until the pipe is ready; False when there is no more use in it."""
        poll = select.poll()
        poll.register(self.fd, event)
        for fd in (self._wake, *others):
            poll.register(fd, select.POLLIN)
        ready = {fd for fd, _ in poll.poll()}
        return not self.stopping and not ready.intersection(others)


class PipeWriter:
    """A pipe's writing end. Takes over ``fd``, which must be non-blocking; its thread closes it.

    What is accepted waits for the thread; it is not copied before. One task at a time may use it. An
    `OSError` of the thread's is raised by the next call, and by each one after it.
    """

    def __init__(
        self, fd: int, peer: str, *, reader: int | None = None, at_end: Callable[[], None] = lambda: None
    ) -> None:
        """``reader`` is a pidfd: when that process ends, nobody makes room in the pipe any more.

        ``at_end`` is called by the thread when it has closed the pipe.
        """
        self._peer = peer
        self._reader = [] if reader is None else [reader]
        self._thread = _PipeThread(fd, peer, at_end)
        self._progress = trio.lowlevel.ParkingLot()
        self._queued = 0
        self._error: Exception | None = None
        self._aborted = False

    async def write_some(self, buffers: Sequence[memoryview]) -> int:
        """As `SendChannel.send_some`."""
        await trio.lowlevel.checkpoint()
        self._check()
        while self._queued >= _MOST_QUEUED:
            await self._progress.park()
            self._check()
        # Nothing from here on waits, so a cancel can only come while nothing has been accepted.
        part = prefix(buffers, min(PIPE_CALL, _MOST_QUEUED - self._queued))
        size = sum(len(buffer) for buffer in part)
        self._queued += size
        self._thread.submit(partial(self._write, part), partial(self._written, size))
        return size

    async def drained(self, check_reader: Callable[[int], None]) -> None:
        """Return when the reader has taken everything out of the pipe.

        Asks for the pipe's fill again and again, after 0.1 ms at first and 10 ms at most, and calls
        ``check_reader`` with it each time, which may raise.
        """
        await trio.lowlevel.checkpoint()
        pause = 0.0001
        while True:
            self._check()
            if self._queued:
                await self._progress.park()
                continue
            left = await self._left_in_pipe()
            self._check()
            check_reader(left)
            if left == 0:
                return
            await trio.sleep(pause)
            pause = min(pause * 2, 0.01)

    async def end(self) -> None:
        """End the stream; returns when the pipe is closed. To be called when it is drained."""
        self._thread.stop()
        await self._thread.closed.wait()
        self._check()

    def abort(self) -> None:
        """Close it at once. Who waits gets `ChannelClosed`. Idempotent."""
        self._aborted = True
        self._thread.stop()
        self._progress.unpark_all()

    def has_reader(self) -> bool:
        """Whether anybody still has the pipe's other end open."""
        poll = select.poll()
        poll.register(self._thread.fd, 0)
        return not poll.poll(0)

    async def _left_in_pipe(self) -> int:
        """In the thread, for this too needs the lock."""
        waiting, told = array.array("i", [0]), trio.Event()

        def done(error: Exception | None) -> None:
            self._error = self._error or error
            told.set()
            self._progress.unpark_all()

        self._thread.submit(lambda: fcntl.ioctl(self._thread.fd, termios.FIONREAD, waiting), done)
        while not told.is_set():
            await self._progress.park()
            self._check()
        return waiting[0]

    def _check(self) -> None:
        if self._aborted:
            raise ChannelClosed(f"{self._peer} was closed by this side")
        if self._error:
            raise self._error

    def _written(self, size: int, error: Exception | None) -> None:
        self._queued -= size
        self._error = self._error or error
        self._progress.unpark_all()

    # The thread runs these.

    def _write(self, buffers: list[memoryview]) -> None:
        while buffers and not self._error:
            try:
                count = os.writev(self._thread.fd, buffers)
            except BlockingIOError:
                # A full pipe is not enough to wait for: a dead process's child may hold its other end open.
                if not self._thread.ready(select.POLLOUT, self._reader):
                    if self._thread.stopping:
                        return
                    raise BrokenPipeError from None
                continue
            while count:
                if count < len(buffers[0]):
                    buffers[0] = buffers[0][count:]
                    break
                count -= len(buffers.pop(0))


class PipeReader:
    """A pipe's reading end. Takes over ``fd`` as `PipeWriter` does. Reads ahead, from the first call on."""

    def __init__(self, fd: int, peer: str, *, at_end: Callable[[], None] = lambda: None) -> None:
        self._peer = peer
        self._thread = _PipeThread(fd, peer, at_end)
        self._progress = trio.lowlevel.ParkingLot()
        self._pieces: deque[tuple[memoryview, memoryview]] = deque()  # what was read, and where it lies
        self._begun = False
        self._ended = False
        self._error: Exception | None = None
        self._aborted = False

    async def read_some(self, buffer: memoryview) -> int:
        """As `ReceiveChannel.receive_some`; 0 when nobody has the writing end open any more."""
        await trio.lowlevel.checkpoint()
        self._check_open()
        if not self._begun:
            self._begun = True
            for _ in range(_READ_AHEAD):
                self._read_ahead(memoryview(bytearray(PIPE_CALL)))
        while not self._pieces:
            if self._error:
                raise self._error
            if self._ended:
                return 0
            await self._progress.park()
            self._check_open()
        piece, block = self._pieces[0]
        count = min(len(buffer), len(piece))
        buffer[:count] = piece[:count]
        if count < len(piece):
            self._pieces[0] = piece[count:], block
        else:
            self._pieces.popleft()
            self._read_ahead(block)
        return count

    def abort(self) -> None:
        """Close it at once. Who waits gets `ChannelClosed`. Idempotent."""
        self._aborted = True
        self._thread.stop()
        self._progress.unpark_all()

    def _check_open(self) -> None:
        if self._aborted:
            raise ChannelClosed(f"{self._peer} was closed by this side")

    def _read_ahead(self, block: memoryview) -> None:
        if self._ended or self._error:
            return
        sizes: list[int] = []

        def done(error: Exception | None) -> None:
            if error:
                self._error = self._error or error
            elif sizes[0]:
                self._pieces.append((block[: sizes[0]], block))
            else:
                self._ended = True
            self._progress.unpark_all()

        self._thread.submit(lambda: sizes.append(self._read(block)), done)

    def _read(self, block: memoryview) -> int:
        """Runs in the thread."""
        while True:
            try:
                return os.readv(self._thread.fd, [block])
            except BlockingIOError:
                if not self._thread.ready(select.POLLIN):
                    return 0


class PipeSender(SendChannel):
    """Sends into a pipe whose reader nobody knows. Takes over ``fd``, as `PipeWriter` does.

    `flush` returns when the reader has taken everything out of the pipe; it counts as sending.
    """

    call_size = PIPE_CALL

    def __init__(self, fd: int, peer: str, at_end: Callable[[], None] = lambda: None) -> None:
        self.peer = peer
        self._pipe = PipeWriter(fd, peer, at_end=at_end)
        self._sending = OneAtATime("sending")
        self._closed = False
        self._failure = ""

    async def send_some(self, buffers: Sequence[memoryview]) -> int:
        with self._sending:
            self._check()
            try:
                return await self._pipe.write_some(buffers)
            except OSError as error:
                raise self._broken(error) from error

    async def flush(self) -> None:
        with self._sending:
            self._check()
            try:
                await self._pipe.drained(self._check_reader)
            except OSError as error:
                raise self._broken(error) from error

    def abort(self) -> None:
        self._closed = True
        self._pipe.abort()

    async def aclose(self) -> None:
        """Flush, and end the stream."""
        if self._closed:
            await trio.lowlevel.checkpoint()
            return
        try:
            await self.flush()
            await self._pipe.end()
        finally:
            self.abort()

    def _check(self) -> None:
        if self._failure and not self._closed:
            raise ChannelBroken(self._failure)

    def _check_reader(self, left: int) -> None:
        if left and not self._pipe.has_reader():
            raise self._fail(f"the reader of {self.peer} has closed it before it had taken everything")

    def _broken(self, error: OSError) -> ChannelBroken:
        if isinstance(error, BrokenPipeError):
            return self._fail(f"the reader of {self.peer} has closed it")
        return self._fail(f"{self.peer} is broken: {why(error)}")

    def _fail(self, sentence: str) -> ChannelBroken:
        self._failure = sentence
        return ChannelBroken(sentence)


class PipeReceiver(ReceiveChannel):
    """Receives from a pipe whose writer nobody knows. Takes over ``fd``, as `PipeReader` does."""

    def __init__(self, fd: int, peer: str, at_end: Callable[[], None] = lambda: None) -> None:
        self.peer = peer
        self._pipe = PipeReader(fd, peer, at_end=at_end)
        self._receiving = OneAtATime("receiving")

    async def receive_some(self, buffer: memoryview) -> int:
        with self._receiving:
            try:
                return await self._pipe.read_some(buffer)
            except OSError as error:
                raise ChannelBroken(f"{self.peer} is broken: {why(error)}") from error

    def abort(self) -> None:
        self._pipe.abort()

    async def aclose(self) -> None:
        self.abort()
        await trio.lowlevel.checkpoint()
