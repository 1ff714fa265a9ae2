"""``exec:COMMAND``: a shell command takes the guest from its standard input, or gives it by its output.

One way: the command can't answer. It may start the guest as soon as it has all of it, as a kvmmig on another
host does, or store it, and its exit status says that all is well. The user can say which, by ``live=``:

- ``on``: it goes on with the guest and does not end; all is well as soon as it has taken everything. That
  goes without saying where the command has an ``--incoming``.
- ``off``: it only stores the guest. Until it has ended with 0 the guest is the source's: a failure or a
  cancel kills the command, and the guest runs on.
- not said: either. From "go" on the guest is the command's, which is not killed any more then. All is well
  when it ends with 0; whatever else becomes of it, the operator decides.
"""

from __future__ import annotations

import re

import trio

from kvmmig.errors import BadURI, ConnectFailed
from kvmmig.transport import Channel, ChannelFeatures, Listener, Option, Transport, TransportURI
from kvmmig.transport.toolkit.process import Process, ProcessReceiver, ProcessSender
from kvmmig.transport.toolkit.workers import open_in_thread
from kvmmig.transport.toolkit.words import why

_LONGEST_NAME = 60
_INCOMING = re.compile(r"\s--?incoming\b")


class ExecTransport(Transport):
    """Runs one shell command: fed with the guest by the source, read from by the destination."""

    summary = "a shell command that takes the guest, or prints it; all is well when it ends with 0"
    syntax = "exec:COMMAND[?live=on|off]"
    options = (
        Option(
            "live",
            "on: the command goes on with the guest; off: it only stores it, and ends",
            "",
            ("on", "off"),
        ),
    )

    def __init__(self, uri: TransportURI) -> None:
        super().__init__(uri)
        if not uri.target.strip() or "\0" in uri.target:
            raise BadURI(f"{str(uri)!r} names no command: write exec:COMMAND, such as exec:'gzip > guest.gz'")
        self._peer = f"the command {_shortened(uri.target)!r}"

    async def connect(self) -> Channel:
        """Starts the command. `abort` kills it and all that it has started in its session; but not what may
        run the guest: see above.
        """
        process = await self._start(fed=True)
        if self.option("live") == "off":
            return _StoringCommand(process, self._peer)
        goes_on = self.option("live") == "on" or bool(_INCOMING.search(self.uri.target))
        return _Command(process, self._peer, goes_on=goes_on)

    async def listen(self) -> Listener:
        await trio.lowlevel.checkpoint()
        return _ExecListener(self)

    async def receive(self) -> Channel:
        """Start the command and read what it prints."""
        return ProcessReceiver(await self._start(fed=False), self._peer)

    async def _start(self, *, fed: bool) -> Process:
        def make() -> Process:
            try:
                return Process(["/bin/sh", "-c", self.uri.target], self._peer, fed=fed)
            except OSError as error:
                raise ConnectFailed(f"can't start {self._peer}: {why(error)}") from error

        return await open_in_thread(make, lambda process: process.drop())


class _StoringCommand(ProcessSender):
    """Feeds a command that stores the guest. `aclose` returns when it has ended well."""

    features = ChannelFeatures(stores=True)


class _Command(ProcessSender):
    """Feeds a command that may start the guest when it has seen the end of the stream."""

    def __init__(self, process: Process, peer: str, *, goes_on: bool) -> None:
        super().__init__(process, peer)
        self._goes_on = goes_on
        self._has_all = False

    def _close_pipe(self) -> None:
        self._has_all = True  # or has been killed: see `abort`
        super()._close_pipe()

    async def _finish(self) -> None:
        if not self._goes_on:
            await super()._finish()

    def _end_process(self) -> None:
        if not self._has_all:
            super()._end_process()

    def _obstacle(self) -> str:
        obstacle = super()._obstacle()
        if not obstacle and self._has_all:
            obstacle = (
                f"process {self._process.pid} has taken all of it but does not end; for one that goes on "
                "with the guest, as a kvmmig does, write live=on behind the command"
            )
        return obstacle


class _ExecListener(Listener):
    """Starts nothing by itself; every `accept` runs the command from its beginning."""

    def __init__(self, transport: ExecTransport) -> None:
        self.uri = str(transport.uri)
        self._transport = transport

    async def accept(self) -> Channel:
        return await self._transport.receive()

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


def _shortened(command: str) -> str:
    words = " ".join(command.split())
    return words if len(words) <= _LONGEST_NAME else words[: _LONGEST_NAME - 3] + "..."
