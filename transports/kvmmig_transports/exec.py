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
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from kvmmig.errors import BadURI, ConnectFailed
from kvmmig.transport import Listener, Option, ReceiveChannel, SendChannel, Transport, TransportURI
from kvmmig.transport.toolkit import (
    AtOnceListener,
    Process,
    ProcessReceiver,
    ProcessSender,
    open_in_thread,
    why,
)

_LONGEST_NAME = 60
_HINT = "for one that goes on with the guest, as a kvmmig does, write live=on behind the command"
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
    arrives_at_once = True

    def __init__(self, uri: TransportURI) -> None:
        super().__init__(uri)
        if not uri.target.strip() or "\0" in uri.target:
            raise BadURI(f"{str(uri)!r} names no command: write exec:COMMAND, such as exec:'gzip > guest.gz'")
        self.stores = self.option("live") == "off"
        self._peer = f"the command {_shortened(uri.target)!r}"

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[SendChannel]:
        """Starts the command. `abort` kills it and all that it has started in its session; but not what may
        run the guest: see above.
        """
        goes_on = self.option("live") == "on" or bool(_INCOMING.search(self.uri.target))
        # One that goes on with the guest knows a stream that was cut; others take its end for the end.
        process = await self._start(fed=True, dies_with_us=not goes_on)
        if self.stores:
            command = ProcessSender(process, self._peer)
        else:
            command = ProcessSender(process, self._peer, spared=True, waits=not goes_on, hint=_HINT)
        async with command as channel:
            yield channel

    @asynccontextmanager
    async def listen(self) -> AsyncIterator[Listener]:
        """Every `accept` runs the command from its beginning."""
        await trio.lowlevel.checkpoint()
        yield AtOnceListener(self.uri, self._read)

    async def _read(self) -> ReceiveChannel:
        return ProcessReceiver(await self._start(fed=False), self._peer)

    async def _start(self, *, fed: bool, dies_with_us: bool = False) -> Process:
        def make() -> Process:
            try:
                command = ["/bin/sh", "-c", self.uri.target]
                return Process(command, self._peer, fed=fed, dies_with_us=dies_with_us)
            except OSError as error:
                raise ConnectFailed(f"can't start {self._peer}: {why(error)}") from error

        return await open_in_thread(make, lambda process: process.drop())


def _shortened(command: str) -> str:
    words = " ".join(command.split())
    return words if len(words) <= _LONGEST_NAME else words[: _LONGEST_NAME - 3] + "..."
