"""The two ends of a pipe.

A lane, which is a thread of its own, writes or reads each pipe. Non-blocking calls on the event loop are not
good enough: the kernel has one lock for both ends of a pipe, and whoever copies holds it. A reader that asks
for a megabyte at a time and then loses its CPU, or waits for a page of its own, holds up a "non-blocking"
writer for as long.

`PipeWriter` and `ReceiveLane` are the mechanism: they raise `OSError` and `ChannelClosed`. What an error
means depends on who is at the other end, so the channels over them say it: `PipeSender` and `PipeReceiver`
here, and those over a process in `kvmmig.transport.toolkit.process`.
"""

from __future__ import annotations

import array
import fcntl
import select
import termios
from collections.abc import Callable, Sequence

import trio

from kvmmig.errors import ChannelBroken
from kvmmig.transport.contract import ReceiveChannel, SendChannel
from kvmmig.transport.toolkit.lanes import ReceiveLane, SendLane
from kvmmig.transport.toolkit.one_at_a_time import OneAtATime
from kvmmig.transport.toolkit.words import why


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
        return await self._lane.send_some(buffers)

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


class PipeSender(SendChannel):
    """Sends into a pipe whose reader nobody knows. Takes over ``fd``, as `PipeWriter` does.

    `flush` returns when the reader has taken everything out of the pipe; it counts as sending.
    """

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
    """Receives from a pipe whose writer nobody knows. Takes over ``fd``, as `ReceiveLane` does."""

    def __init__(self, fd: int, peer: str, at_end: Callable[[], None] = lambda: None) -> None:
        self.peer = peer
        self._pipe = ReceiveLane(fd, peer, at_end=at_end)
        self._receiving = OneAtATime("receiving")

    async def receive_some(self, buffer: memoryview) -> int:
        with self._receiving:
            try:
                return await self._pipe.receive_some(buffer)
            except OSError as error:
                raise ChannelBroken(f"{self.peer} is broken: {why(error)}") from error

    def abort(self) -> None:
        self._pipe.abort()

    async def aclose(self) -> None:
        self.abort()
        await trio.lowlevel.checkpoint()
