"""``pipe:PATH?direct=on|off&helper=PROGRAM``: a saved guest in a file that a helper process writes.

The monitor writes to a non-blocking pipe, which can be polled as a file can't; the helper does the waiting
for the disk. We open the file, the helper inherits it, so it needs no rights of its own. The default helper
is `kvmmig_transports.iohelper`; any program with the command line ``FILENAME FD`` will do.
"""

from __future__ import annotations

import array
import fcntl
import os
import select
import termios
from collections.abc import Callable, Sequence

import trio

from kvmmig.errors import BadURI, ChannelBroken, ChannelClosed
from kvmmig.migration.transport import (
    Channel,
    ChannelFeatures,
    Listener,
    OneAtATime,
    Option,
    Transport,
    TransportURI,
)
from kvmmig_transports._buffers import prefix
from kvmmig_transports._helper import Helper, find_program
from kvmmig_transports._savefile import SavedFile, SaveFile, why
from kvmmig_transports._threads import Workers, open_in_thread

_MOST_BYTES = 1 << 20  # the whole pipe: copying it takes 0.3-0.5 ms
_LAST_WORDS = 2.0  # seconds that a helper has for ending after it has closed its pipe


class PipeTransport(Transport):
    """Saves to, or restores from, one regular file, through a helper process."""

    summary = "a file on a disk, through a pipe to an I/O helper process"
    syntax = "pipe:PATH[?direct=on|off&helper=PROGRAM]"
    options = (
        Option("direct", "open the file with O_DIRECT, around the page cache", "on", ("on", "off")),
        Option("helper", "a program with libvirt's FILENAME FD command line, instead of our own"),
    )

    def __init__(self, uri: TransportURI) -> None:
        super().__init__(uri)
        if not uri.target or "\0" in uri.target:
            raise BadURI(f"{str(uri)!r} names no file: write pipe:PATH, such as pipe:/var/tmp/guest.img")
        self._direct = self.option("direct") == "on"

    async def connect(self) -> Channel:
        """The file at PATH, if there is one, stays as it is until the channel's `aclose`."""
        path = self.uri.target

        def make() -> tuple[SaveFile, Helper]:
            program = find_program(self.option("helper"))
            save = SaveFile.create(path, direct=self._direct)
            try:
                return save, Helper(program, path, save.fd, writes_file=True)
            except BaseException:
                save.close()
                raise

        def drop(made: tuple[SaveFile, Helper]) -> None:
            save, helper = made
            _drop(helper)
            save.close()

        return PipeWriter(*await open_in_thread(make, drop))

    async def listen(self) -> Listener:
        await trio.lowlevel.checkpoint()
        return PipeListener(self.uri, self._direct, self.option("helper"))


class PipeListener(Listener):
    """Starts nothing by itself; every `accept` starts a helper that reads the file from its start."""

    def __init__(self, uri: TransportURI, direct: bool, helper: str) -> None:
        self.uri = str(uri)
        self._path = uri.target
        self._direct = direct
        self._helper = helper

    async def accept(self) -> Channel:
        def make() -> tuple[Helper, tuple[str, ...]]:
            program = find_program(self._helper)
            saved = SavedFile(self._path, direct=self._direct)
            try:
                return Helper(program, self._path, saved.fd, writes_file=False), saved.notices
            finally:
                saved.close()

        return PipeReader(*await open_in_thread(make, lambda made: _drop(made[0])))

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


class _PipeChannel(Channel):
    """What both directions share: the helper, and the end of it all."""

    features = ChannelFeatures(durable=True)

    def __init__(self, helper: Helper, at_end: Callable[[], None]) -> None:
        self.peer = helper.path
        self._helper = helper
        self._workers = Workers(f"end of {helper.path}", 1, at_end)
        self._closed = False
        self._failure = ""

    def abort(self) -> None:
        """Kill the helper; a thread waits for its end, which takes long only in a dead disk."""
        if not self._closed:
            self._closed = True
            self._helper.kill()
            self._close_pipe()
            trio.lowlevel.notify_closing(self._helper.pidfd)
            self._workers.stop()

    def _close_pipe(self) -> None:
        if self._helper.pipe >= 0:
            trio.lowlevel.notify_closing(self._helper.pipe)
            self._helper.close_pipe()

    def _check(self) -> None:
        if self._closed:
            raise ChannelClosed(f"{self.peer} was closed by this side")
        if self._failure:
            raise ChannelBroken(self._failure)

    def _fail(self, sentence: str) -> ChannelBroken:
        self._failure = sentence
        return ChannelBroken(sentence)

    async def _wait(self, fd: int) -> None:
        try:
            await trio.lowlevel.wait_readable(fd)
        except trio.ClosedResourceError:
            self._check()
            raise

    async def _helper_ended(self) -> None:
        await self._wait(self._helper.pidfd)
        self._check()


class PipeWriter(_PipeChannel):
    """The source's side. Takes over ``save``, an empty file, and ``helper``, which writes it.

    `flush` returns when the helper has taken everything out of the pipe; durable is what `aclose` has
    returned for. A cancel that comes when `aclose` has already begun to rename is too late: the file
    appears, whole.
    """

    def __init__(self, save: SaveFile, helper: Helper) -> None:
        def at_end() -> None:
            helper.reap()
            save.close()

        super().__init__(helper, at_end)
        self.notices = save.notices
        self._save = save
        self._sending = OneAtATime("sending")
        # A full pipe is not enough to wait for: a dead helper's child may hold its other end open.
        self._ready = select.epoll()
        self._ready.register(helper.pipe, select.EPOLLOUT)
        self._ready.register(helper.pidfd, select.EPOLLIN)
        self._published = trio.Event()

    async def send_some(self, buffers: Sequence[memoryview]) -> int:
        with self._sending:
            await trio.lowlevel.checkpoint()
            while True:
                self._check()
                try:
                    return os.writev(self._helper.pipe, prefix(buffers, _MOST_BYTES))
                except BlockingIOError:
                    await self._wait(self._ready.fileno())
                    self._check_helper()
                except OSError as error:
                    with trio.move_on_after(_LAST_WORDS):
                        await self._helper_ended()
                    raise self._fail(self._helper.account()) from error

    async def receive_some(self, buffer: memoryview) -> int:
        raise ChannelBroken(f"{self.peer} is being written; nothing can be received from it")

    async def flush(self) -> None:
        """Asks for the pipe's fill again and again, after 0.1 ms at first and 10 ms at most."""
        await trio.lowlevel.checkpoint()
        waiting = array.array("i", [0])
        pause = 0.0001
        while True:
            self._check()
            self._check_helper()
            fcntl.ioctl(self._helper.pipe, termios.FIONREAD, waiting)
            if waiting[0] == 0:
                return
            await trio.sleep(pause)
            pause = min(pause * 2, 0.01)

    def abort(self) -> None:
        if not self._closed:
            self._save.give_up()
            super().abort()
            self._published.set()

    async def aclose(self) -> None:
        """End the stream, wait for the helper's exit status, make the file durable, give it its name."""
        if self._closed:
            await trio.lowlevel.checkpoint()
            return
        try:
            await trio.lowlevel.checkpoint()
            self._check()
            with self._sending:
                self._close_pipe()
                await self._helper_ended()
                if self._helper.status != 0:
                    raise self._fail(self._helper.account())
                await self._publish()
        finally:
            self.abort()

    def _close_pipe(self) -> None:
        if not self._ready.closed:
            trio.lowlevel.notify_closing(self._ready.fileno())
            self._ready.close()
        super()._close_pipe()

    def _check_helper(self) -> None:
        if self._helper.status is not None:
            raise self._fail(self._helper.account())

    async def _publish(self) -> None:
        failures: list[Exception] = []

        def done(error: Exception | None) -> None:
            if error:
                failures.append(error)
            self._published.set()

        self._workers.submit(self._save.publish, done)
        await self._published.wait()
        self._check()
        for error in failures:
            raise self._fail(f"can't write {self.peer}: {why(error)}") from error


class PipeReader(_PipeChannel):
    """The destination's side. Takes over ``helper``, which reads the file."""

    def __init__(self, helper: Helper, notices: tuple[str, ...]) -> None:
        super().__init__(helper, helper.reap)
        self.notices = notices
        self._receiving = OneAtATime("receiving")

    async def send_some(self, buffers: Sequence[memoryview]) -> int:
        raise ChannelBroken(f"{self.peer} is being read; nothing can be sent to it")

    async def receive_some(self, buffer: memoryview) -> int:
        """The end of the pipe is the end of the stream only if the helper says, by its status, that it is."""
        with self._receiving:
            await trio.lowlevel.checkpoint()
            while True:
                self._check()
                try:
                    count = os.readv(self._helper.pipe, [buffer[:_MOST_BYTES]])
                except BlockingIOError:
                    await self._wait(self._helper.pipe)
                    continue
                if count == 0:
                    await self._helper_ended()
                    if self._helper.status != 0:
                        raise self._fail(self._helper.account())
                return count

    async def flush(self) -> None:
        await trio.lowlevel.checkpoint()
        self._check()

    async def aclose(self) -> None:
        self.abort()
        await trio.lowlevel.checkpoint()


def _drop(helper: Helper) -> None:
    helper.kill()
    helper.close_pipe()
    helper.reap()
