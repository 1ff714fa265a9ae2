"""One end of a pipe: what ``pipe:``, ``exec:`` and ``fd:`` have in common."""

from __future__ import annotations

import array
import fcntl
import os
import select
import termios
from collections.abc import Sequence

import trio

from kvmmig.errors import ChannelBroken, ChannelClosed
from kvmmig.migration.transport import Channel, ChannelFeatures, OneAtATime
from kvmmig_transports._buffers import prefix
from kvmmig_transports._words import why

# A quarter of the pipe: a write waits for the lock of a reader who is copying, and it is a shorter one so.
_MOST_BYTES = 1 << 18


class PipeChannel(Channel):
    """Either end. Takes over ``fd``, which must be non-blocking."""

    def __init__(self, fd: int, peer: str) -> None:
        self.peer = peer
        self._pipe = fd
        self._closed = False
        self._failure = ""

    def abort(self) -> None:
        self._closed = True
        self._close_pipe()

    def _close_pipe(self) -> None:
        if self._pipe >= 0:
            fd, self._pipe = self._pipe, -1
            trio.lowlevel.notify_closing(fd)
            os.close(fd)

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


class PipeSender(PipeChannel):
    """The writing end. `flush` returns when the reader has taken everything out of the pipe."""

    def __init__(self, fd: int, peer: str) -> None:
        super().__init__(fd, peer)
        self._sending = OneAtATime("sending")

    async def send_some(self, buffers: Sequence[memoryview]) -> int:
        with self._sending:
            await trio.lowlevel.checkpoint()
            while True:
                self._check()
                try:
                    return os.writev(self._pipe, prefix(buffers, _MOST_BYTES))
                except BlockingIOError:
                    await self._wait_writable()
                except OSError as error:
                    raise await self._broken(error) from error

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
                await self._finish()
        finally:
            self.abort()

    async def _drained(self) -> None:
        waiting = array.array("i", [0])
        pause = 0.0001
        while True:
            self._check()
            fcntl.ioctl(self._pipe, termios.FIONREAD, waiting)
            self._check_reader(drained=waiting[0] == 0)
            if waiting[0] == 0:
                return
            await trio.sleep(pause)
            pause = min(pause * 2, 0.01)

    async def _finish(self) -> None:
        """What is still to be done when the pipe is drained and closed."""

    async def _wait_writable(self) -> None:
        try:
            await trio.lowlevel.wait_writable(self._pipe)
        except trio.ClosedResourceError:
            self._check()
            raise

    async def _broken(self, error: OSError) -> ChannelBroken:
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


class LivePipeSender(PipeSender):
    """To a reader of whom nothing is known: it may be a machine that starts the guest."""

    features = ChannelFeatures(live=True)


class PipeReceiver(PipeChannel):
    """The reading end."""

    def __init__(self, fd: int, peer: str) -> None:
        super().__init__(fd, peer)
        self._receiving = OneAtATime("receiving")

    async def send_some(self, buffers: Sequence[memoryview]) -> int:
        raise ChannelBroken(f"{self.peer} is being read; nothing can be sent to it")

    async def receive_some(self, buffer: memoryview) -> int:
        with self._receiving:
            await trio.lowlevel.checkpoint()
            while True:
                self._check()
                try:
                    count = os.readv(self._pipe, [buffer[:_MOST_BYTES]])
                except BlockingIOError:
                    await self._wait_readable(self._pipe)
                    continue
                except OSError as error:
                    raise self._fail(f"{self.peer} is broken: {why(error)}") from error
                if count == 0:
                    await self._at_end()
                return count

    async def flush(self) -> None:
        await trio.lowlevel.checkpoint()
        self._check()

    async def aclose(self) -> None:
        self.abort()
        await trio.lowlevel.checkpoint()

    async def _at_end(self) -> None:
        """Raise `ChannelBroken` if the end of the pipe is not the end of the stream."""
