"""One end of a pipe: what ``pipe:``, ``exec:`` and ``fd:`` have in common.

A thread of its own writes, or reads, each pipe. Non-blocking calls on the event loop are not good enough: the
kernel has one lock for both ends of a pipe, and whoever copies holds it. A reader that asks for a megabyte at
a time and then loses its CPU, or waits for a page of its own, holds up a "non-blocking" writer for as long.
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
from kvmmig.transport import Channel, OneAtATime
from kvmmig.transport.toolkit.prefix import prefix
from kvmmig.transport.toolkit.workers import Workers
from kvmmig.transport.toolkit.words import why

#: Bytes of one call: a quarter of the largest pipe.
_MOST_BYTES = 1 << 18
#: Bytes that may wait for the thread: as much as it writes meanwhile.
_MOST_QUEUED = 1 << 19
_READ_AHEAD = 2  # pieces


class PipeChannel(Channel):
    """Either end. Takes over ``fd``, which must be non-blocking.

    The thread closes it: nobody else could without it being used once more, under a number that by then is
    somebody else's file. It calls ``at_end`` right afterwards.
    """

    def __init__(self, fd: int, peer: str, at_end: Callable[[], None] = lambda: None) -> None:
        self.peer = peer
        self._pipe = fd
        self._closed = False
        self._failure = ""
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._stopping = False
        self._let_go = trio.Event()
        self._progress = trio.lowlevel.ParkingLot()
        token = trio.lowlevel.current_trio_token()

        def end() -> None:
            os.close(fd)
            os.close(self._wake)
            at_end()
            with contextlib.suppress(trio.RunFinishedError):
                token.run_sync_soon(self._let_go.set)

        self._thread = Workers(f"pipe of {peer}", 1, end)

    def abort(self) -> None:
        if not self._closed:
            self._closed = True
            self._close_pipe()
            self._progress.unpark_all()

    def _close_pipe(self) -> None:
        """Have the thread close it, as soon as it is out of whatever call it is in."""
        if not self._stopping:
            self._stopping = True
            os.eventfd_write(self._wake, 1)
            self._thread.stop()

    def _check(self) -> None:
        if self._closed:
            raise ChannelClosed(f"{self.peer} was closed by this side")
        if self._failure:
            raise ChannelBroken(self._failure)

    def _fail(self, sentence: str) -> ChannelBroken:
        self._failure = sentence
        return ChannelBroken(sentence)

    async def _wait_readable(self, fd: int) -> None:
        try:
            await trio.lowlevel.wait_readable(fd)
        except trio.ClosedResourceError:
            self._check()
            raise

    def _poll(self, event: int, others: Sequence[int] = ()) -> bool:
        """In the thread: wait until the pipe is ready; False when there is no more use in it."""
        poll = select.poll()
        poll.register(self._pipe, event)
        for fd in (self._wake, *others):
            poll.register(fd, select.POLLIN)
        ready = {fd for fd, _ in poll.poll()}
        return not self._stopping and not ready.intersection(others)


class PipeSender(PipeChannel):
    """The writing end. What is accepted waits for the thread; it is not copied before.

    `flush` returns when the reader has taken everything out of the pipe.
    """

    def __init__(self, fd: int, peer: str, at_end: Callable[[], None] = lambda: None) -> None:
        super().__init__(fd, peer, at_end)
        self._sending = OneAtATime("sending")
        self._queued = 0
        self._error: Exception | None = None

    async def send_some(self, buffers: Sequence[memoryview]) -> int:
        with self._sending:
            await trio.lowlevel.checkpoint()
            await self._check_written()
            while self._queued >= _MOST_QUEUED:
                await self._progress.park()
                await self._check_written()
            # Nothing from here on waits, so a cancel can only come while nothing has been accepted.
            part = prefix(buffers, min(_MOST_BYTES, _MOST_QUEUED - self._queued))
            size = sum(len(buffer) for buffer in part)
            self._queued += size
            self._thread.submit(partial(self._write, part), partial(self._written, size))
            return size

    async def receive_some(self, buffer: memoryview) -> int:
        raise ChannelBroken(f"{self.peer} is being written; nothing can be received from it")

    async def flush(self) -> None:
        """Asks for the pipe's fill again and again, after 0.1 ms at first and 10 ms at most.

        Counts as sending: not both at a time.
        """
        with self._sending:
            await trio.lowlevel.checkpoint()
            await self._drained()

    async def aclose(self) -> None:
        """Flush, end the stream, and let the reader finish."""
        if self._closed:
            await trio.lowlevel.checkpoint()
            return
        try:
            with self._sending:
                await trio.lowlevel.checkpoint()
                await self._drained()
                self._close_pipe()
                await self._let_go.wait()
                self._check()
                await self._finish()
        finally:
            self.abort()

    async def _drained(self) -> None:
        pause = 0.0001
        while True:
            await self._check_written()
            if self._queued:
                await self._progress.park()
                continue
            left = await self._left_in_pipe()
            await self._check_written()
            self._check_reader(drained=left == 0)
            if left == 0:
                return
            await trio.sleep(pause)
            pause = min(pause * 2, 0.01)

    async def _left_in_pipe(self) -> int:
        """In the thread, for this too needs the lock."""
        waiting, told = array.array("i", [0]), trio.Event()

        def done(error: Exception | None) -> None:
            self._error = self._error or error
            told.set()
            self._progress.unpark_all()

        self._thread.submit(lambda: fcntl.ioctl(self._pipe, termios.FIONREAD, waiting), done)
        while not told.is_set():
            await self._progress.park()
            self._check()
        return waiting[0]

    async def _finish(self) -> None:
        """What is still to be done when the pipe is drained and closed."""

    async def _check_written(self) -> None:
        self._check()
        if self._error:
            raise await self._broken(self._error) from self._error

    async def _broken(self, error: Exception) -> ChannelBroken:
        if isinstance(error, BrokenPipeError):
            return self._fail(f"the reader of {self.peer} has closed it")
        return self._fail(f"{self.peer} is broken: {why(error)}")

    def _check_reader(self, *, drained: bool) -> None:
        """Raise `ChannelBroken` if nobody is left to take what is in the pipe."""
        if not drained:
            poll = select.poll()
            poll.register(self._pipe, 0)
            if poll.poll(0):
                raise self._fail(f"the reader of {self.peer} has closed it before it had taken everything")

    def _written(self, size: int, error: Exception | None) -> None:
        self._queued -= size
        self._error = self._error or error
        self._progress.unpark_all()

    # The thread runs these.

    def _write(self, buffers: list[memoryview]) -> None:
        while buffers and not self._error:
            try:
                count = os.writev(self._pipe, buffers)
            except BlockingIOError:
                if not self._wait_for_room():
                    return
                continue
            while count:
                if count < len(buffers[0]):
                    buffers[0] = buffers[0][count:]
                    break
                count -= len(buffers.pop(0))

    def _wait_for_room(self) -> bool:
        """False when the channel was closed meanwhile; raises where nobody will ever make room."""
        return self._poll(select.POLLOUT)


class PipeReceiver(PipeChannel):
    """The reading end. The thread reads ahead, from the first call on."""

    def __init__(self, fd: int, peer: str, at_end: Callable[[], None] = lambda: None) -> None:
        super().__init__(fd, peer, at_end)
        self._receiving = OneAtATime("receiving")
        self._pieces: deque[tuple[memoryview, memoryview]] = deque()  # what was read, and where it lies
        self._reading = 0
        self._begun = False
        self._ended = False
        self._error: Exception | None = None

    async def send_some(self, buffers: Sequence[memoryview]) -> int:
        raise ChannelBroken(f"{self.peer} is being read; nothing can be sent to it")

    async def receive_some(self, buffer: memoryview) -> int:
        with self._receiving:
            await trio.lowlevel.checkpoint()
            self._check()
            if not self._begun:
                self._begun = True
                for _ in range(_READ_AHEAD):
                    self._read_ahead(memoryview(bytearray(_MOST_BYTES)))
            while not self._pieces:
                if self._error:
                    raise self._fail(f"{self.peer} is broken: {why(self._error)}") from self._error
                if self._ended:
                    await self._at_end()
                    return 0
                await self._progress.park()
                self._check()
            piece, block = self._pieces[0]
            count = min(len(buffer), len(piece))
            buffer[:count] = piece[:count]
            if count < len(piece):
                self._pieces[0] = piece[count:], block
            else:
                self._pieces.popleft()
                self._read_ahead(block)
            return count

    async def flush(self) -> None:
        await trio.lowlevel.checkpoint()
        self._check()

    async def aclose(self) -> None:
        self.abort()
        await trio.lowlevel.checkpoint()

    async def _at_end(self) -> None:
        """Raise `ChannelBroken` if the end of the pipe is not the end of the stream."""

    def _read_ahead(self, block: memoryview) -> None:
        if self._ended or self._error:
            return
        sizes: list[int] = []

        def read() -> None:
            sizes.append(self._read(block))

        def done(error: Exception | None) -> None:
            if error:
                self._error = self._error or error
            elif sizes[0]:
                self._pieces.append((block[: sizes[0]], block))
            else:
                self._ended = True
            self._progress.unpark_all()

        self._thread.submit(read, done)

    def _read(self, block: memoryview) -> int:
        """Runs in the thread."""
        while True:
            try:
                return os.readv(self._pipe, [block])
            except BlockingIOError:
                if not self._poll(select.POLLIN):
                    return 0
