"""``pipe:PATH?direct=on|off&helper=PROGRAM``: a saved guest in a file that a helper process writes.

The monitor writes to a non-blocking pipe, which can be polled as a file can't; the helper does the waiting
for the disk. We open the file, the helper inherits it, so it needs no rights of its own. The default helper
is `kvmmig_transports.iohelper`; any program with the command line ``FILENAME FD`` will do.
"""

from __future__ import annotations

import trio

from kvmmig.errors import BadURI
from kvmmig.transport import Channel, ChannelFeatures, Listener, Option, Transport, TransportURI
from kvmmig_transports._helper import start_helper
from kvmmig.transport.toolkit.process import Process, ProcessReceiver, ProcessSender
from kvmmig.transport.toolkit.savefile import SavedFile, SaveFile
from kvmmig.transport.toolkit.workers import open_in_thread
from kvmmig.transport.toolkit.words import why


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

        def make() -> tuple[SaveFile, Process]:
            save = SaveFile.create(path, direct=self._direct)
            try:
                return save, start_helper(self.option("helper"), path, save.fd, writes_file=True)
            except BaseException:
                save.close()
                raise

        def drop(made: tuple[SaveFile, Process]) -> None:
            save, helper = made
            helper.drop()
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
        def make() -> tuple[Process, tuple[str, ...]]:
            saved = SavedFile(self._path, direct=self._direct)
            try:
                return start_helper(self._helper, self._path, saved.fd, writes_file=False), saved.notices
            finally:
                saved.close()

        helper, notices = await open_in_thread(make, lambda made: made[0].drop())
        return PipeReader(helper, self._path, notices)

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


class PipeWriter(ProcessSender):
    """The source's side. Takes over ``save``, an empty file, and ``helper``, which writes it.

    `flush` returns when the helper has taken everything out of the pipe; durable is what `aclose` has
    returned for. A cancel that comes when `aclose` has already begun to rename is too late: the file
    appears, whole.
    """

    features = ChannelFeatures(stores=True)

    def __init__(self, save: SaveFile, helper: Process) -> None:
        super().__init__(helper, save.path, save.close)
        self.notices = save.notices
        self._save = save
        self._published = trio.Event()

    def abort(self) -> None:
        if not self._closed:
            self._save.give_up()
            super().abort()
            self._published.set()

    async def _finish(self) -> None:
        """Wait for the helper's exit status, make the file durable, give it its name."""
        await super()._finish()
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


class PipeReader(ProcessReceiver):
    """The destination's side. Takes over ``helper``, which reads the file."""

    def __init__(self, helper: Process, path: str, notices: tuple[str, ...]) -> None:
        super().__init__(helper, path)
        self.notices = notices
