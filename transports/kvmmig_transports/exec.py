"""``exec:COMMAND``: a shell command takes the guest from its standard input, or gives it by its output.

One way: the command can't answer. What counts is its exit status: a save has succeeded when the command has
taken everything and ended with 0. A command that goes on with the guest, such as a kvmmig on another host,
does not end; it needs ``live=on``: then the guest is its own as soon as it has taken everything.
"""

from __future__ import annotations

import trio

from kvmmig.errors import BadURI, ConnectFailed
from kvmmig.migration.transport import Channel, Listener, Option, Transport, TransportURI
from kvmmig_transports._process import LiveProcessSender, Process, ProcessReceiver, ProcessSender
from kvmmig_transports._threads import open_in_thread
from kvmmig_transports._words import why

_LONGEST_NAME = 60


class ExecTransport(Transport):
    """Runs one shell command: fed with the guest by the source, read from by the destination."""

    summary = "a shell command that takes the guest, or prints it; all is well when it ends with 0"
    syntax = "exec:COMMAND[?live=on|off]"
    options = (
        Option(
            "live", "on for a command that goes on with the guest instead of ending", "off", ("on", "off")
        ),
    )

    def __init__(self, uri: TransportURI) -> None:
        super().__init__(uri)
        if not uri.target.strip() or "\0" in uri.target:
            raise BadURI(f"{str(uri)!r} names no command: write exec:COMMAND, such as exec:'gzip > guest.gz'")
        self._peer = f"the command {_shortened(uri.target)!r}"

    async def connect(self) -> Channel:
        """Starts the command. `abort` kills it and all that it has started in its session."""
        sender = LiveProcessSender if self.option("live") == "on" else ProcessSender
        return sender(await self._start(fed=True), self._peer)

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
