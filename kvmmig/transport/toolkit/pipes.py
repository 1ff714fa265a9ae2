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
import fcntl
import os
import select
import termios
from collections import deque
from collections.abc import Callable, Sequence

import trio

from kvmmig.errors import ChannelBroken, ChannelClosed
from kvmmig.transport.contract import ReceiveChannel, SendChannel
from kvmmig.transport.toolkit.lanes import Lane, SendLane
from kvmmig.transport.toolkit.one_at_a_time import OneAtATime
from kvmmig.transport.toolkit.words import why

#: Bytes of one call: a quarter of the largest pipe.
PIPE_CALL = 1 << 18
_READ_AHEAD = 2  # pieces


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
        self._lane = SendLane(fd, peer, reader=reader, at_end=at_end)

    async def write_some(self, buffers: Sequence[memoryview]) -> int:
        """As `SendChannel.send_some`."""
        return await self._lane.send_some(buffers, PIPE_CALL)

    async def drained(self, check_reader: Callable[[int], None]) -> None:
        """Return when the reader has taken everything out of the pipe.

        Asks for the pipe's fill again and again, after 0.1 ms at first and 10 ms at most, and calls
        ``check_reader`` with it each time, which may raise.
        """
        await trio.lowlevel.checkpoint()
        pause = 0.0001
        while True:
            await self._lane.wait_idle()
            left = await self._left_in_pipe()
            check_reader(left)
            if left == 0:
                return
            await trio.sleep(pause)
            pause = min(pause * 2, 0.01)

    async def end(self) -> None:
        """End the stream; returns when the pipe is closed. To be called when it is drained."""
        await self._lane.end()

    def abort(self) -> None:
        """Close it at once. Who waits gets `ChannelClosed`. Idempotent."""
        self._lane.abort()

    def has_reader(self) -> bool:
        """Whether anybody still has the pipe's other end open."""
        poll = select.poll()
        poll.register(self._lane.lane.fd, 0)
        return not poll.poll(0)

    async def _left_in_pipe(self) -> int:
        """In the thread, for this too needs the lock."""
        waiting = array.array("i", [0])
        await self._lane.in_thread(lambda: fcntl.ioctl(self._lane.lane.fd, termios.FIONREAD, waiting))
        return waiting[0]


class PipeReader:
    """A pipe's reading end. Takes over ``fd`` as `PipeWriter` does. Reads ahead, from the first call on."""

    def __init__(self, fd: int, peer: str, *, at_end: Callable[[], None] = lambda: None) -> None:
        self._peer = peer
        self._thread = Lane(fd, peer, at_end)
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
                if not self._thread.ready(select.POLLIN) and self._thread.stopping:
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
