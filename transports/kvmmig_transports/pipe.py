"""``pipe:PATH?direct=on|off&replace=seen|any|none&helper=PROGRAM``: a file that a helper writes.

The monitor writes to a non-blocking pipe, which can be polled as a file can't; the helper does the waiting
for the disk. We open the file, the helper inherits it, so it needs no rights of its own. The default helper
is `kvmmig_transports.iohelper`; any program with the command line ``FILENAME FD`` will do.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import trio

from kvmmig.errors import BadURI, ChannelBroken, ChannelClosed, ConnectFailed
from kvmmig.transport import Listener, Option, ReceiveChannel, SendChannel, Transport, TransportURI
from kvmmig.transport.toolkit import (
    REPLACE_OPTION,
    AtOnceListener,
    Process,
    ProcessReceiver,
    ProcessSender,
    Replace,
    SavedFile,
    SaveFile,
    Workers,
    open_in_thread,
    why,
)
from kvmmig_transports import iohelper


class PipeTransport(Transport):
    """Saves to, or restores from, one regular file, through a helper process."""

    summary = "a file on a disk, through a pipe to an I/O helper process"
    syntax = "pipe:PATH[?direct=on|off&replace=seen|any|none&helper=PROGRAM]"
    options = (
        Option("direct", "open the file with O_DIRECT, around the page cache", "on", ("on", "off")),
        REPLACE_OPTION,
        Option("helper", "a program with libvirt's FILENAME FD command line, instead of our own"),
    )
    target_is_path = True
    stores = True
    arrives_at_once = True

    def __init__(self, uri: TransportURI) -> None:
        super().__init__(uri)
        if not uri.target or "\0" in uri.target:
            raise BadURI(f"{str(uri)!r} names no file: write pipe:PATH, such as pipe:/var/tmp/guest.img")
        self._path = uri.target
        self._direct = self.option("direct") == "on"
        self.starts_programs = bool(self.option("helper"))
        self._replace = Replace(self.option("replace"))

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[SendChannel]:
        """The file at PATH, if there is one, stays as it is until the channel's `aclose`."""

        def make() -> tuple[SaveFile, Process]:
            save = SaveFile.create(self._path, direct=self._direct, replace=self._replace)
            try:
                return save, self._start_helper(save.fd, writes_file=True)
            except BaseException:
                save.close()
                raise

        def drop(made: tuple[SaveFile, Process]) -> None:
            made[1].drop()
            made[0].close()

        async with _HelpedSave(*await open_in_thread(make, drop)) as channel:
            yield channel

    @asynccontextmanager
    async def listen(self) -> AsyncIterator[Listener]:
        await trio.lowlevel.checkpoint()
        yield AtOnceListener(self.uri, self._read)

    async def _read(self) -> ReceiveChannel:
        def make() -> tuple[Process, tuple[str, ...]]:
            saved = SavedFile(self._path, direct=self._direct)
            try:
                return self._start_helper(saved.fd, writes_file=False), saved.notices
            finally:
                saved.close()

        helper, notices = await open_in_thread(make, lambda made: made[0].drop())
        return ProcessReceiver(helper, self._path, notices)

    def _start_helper(self, fd: int, *, writes_file: bool) -> Process:
        command = [*_find_program(self.option("helper")), self._path, str(fd)]
        try:
            return Process(command, f"the I/O helper of {self._path}", fed=writes_file, fds=(fd,))
        except OSError as error:
            raise ConnectFailed(f"can't start the I/O helper {command[0]}: {why(error)}") from error


def _find_program(helper: str) -> list[str]:
    if not helper:
        return [sys.executable, "-I", "-S", iohelper.__file__]
    program = shutil.which(helper)
    if program is None:
        where = "there is no such program" if "/" in helper else "no directory of PATH has such a program"
        raise ConnectFailed(f"can't start the I/O helper {helper}: {where}")
    return [program]


class _HelpedSave(SendChannel):
    """Takes over ``save``, an empty file, and ``helper``, which writes it.

    `flush` returns when the helper has taken everything out of the pipe; durable is what `aclose` has
    returned for. A cancel that comes when `aclose` has already begun to rename is too late: the file
    appears, whole.
    """

    def __init__(self, save: SaveFile, helper: Process) -> None:
        self.peer = save.path
        self.notices = save.notices
        self._save = save
        self._helper = ProcessSender(helper, save.path)
        self._publisher = Workers(f"write {save.path}", 1, save.close)
        self._published = trio.Event()
        self._closed = False

    async def send_some(self, buffers: Sequence[memoryview]) -> int:
        return await self._helper.send_some(buffers)

    async def flush(self) -> None:
        await self._helper.flush()

    def abort(self) -> None:
        if not self._closed:
            self._closed = True
            self._save.give_up()
            self._helper.abort()
            self._publisher.stop()
            self._published.set()

    async def aclose(self) -> None:
        """Wait for the helper's exit status, make the file durable, give it its name."""
        if self._closed:
            await trio.lowlevel.checkpoint()
            return
        try:
            await self._helper.aclose()
            await self._publish()
        finally:
            self.abort()

    def waits_for(self) -> str:
        return self._helper.waits_for()

    async def _publish(self) -> None:
        failures: list[Exception] = []

        def done(error: Exception | None) -> None:
            if error:
                failures.append(error)
            self._published.set()

        if not self._closed:
            self._publisher.submit(self._save.publish, done)
        await self._published.wait()
        if self._closed:
            raise ChannelClosed(f"{self.peer} was closed by this side")
        for error in failures:
            raise ChannelBroken(f"can't write {self.peer}: {why(error)}") from error
