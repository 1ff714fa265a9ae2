"""What the other side of a two-way channel says while a guest moves there."""

from __future__ import annotations

from collections.abc import Callable

import trio

from kvmmig import stream
from kvmmig.errors import ChannelBroken, KvmmigError, MigrationError, MigrationRefused, StreamError
from kvmmig.migration.steps import because
from kvmmig.transport.guard import GuardedChannel


class Peer:
    """Listens to the other side: one task runs `listen`, another waits for what it is to say by `hear`."""

    def __init__(self, name: str, phase: Callable[[], str]) -> None:
        """``phase`` says where this side is, for errors."""
        #: What it is called, for errors.
        self.name = name
        self._phase = phase
        self._said = {
            kind: trio.Event() for kind in (stream.Kind.ACCEPT, stream.Kind.READY, stream.Kind.RUNNING)
        }
        self._silent = trio.Event()
        self._channel: GuardedChannel | None = None

    def has_said(self, kind: stream.Kind) -> bool:
        """It has said so."""
        return self._said[kind].is_set()

    async def listen(self, channel: GuardedChannel) -> None:
        """Take in what it says until it has said all.

        Raises `MigrationRefused` with the reason that it gives, `ChannelBroken` where it goes away before,
        `StreamError` for what it can't mean.
        """
        self._channel = channel
        decoder = stream.Decoder(stream.Direction.BACKWARDS)
        try:
            while not decoder.finished:
                count = await channel.receive_some(decoder.buffer())
                if count == 0:
                    raise ChannelBroken(
                        f"{self.name} closed the connection in this side's {self._phase()} phase"
                    )
                match decoder.advance(count):
                    case stream.Signal(kind):
                        self._said[kind].set()
                    case stream.Fail(text):
                        raise MigrationRefused(f"{self.name} can't take the guest: {text}")
        except StreamError as error:
            name_sender(error, self.name)
            raise
        finally:
            self._silent.set()

    async def hear(self, kind: stream.Kind, seconds: float) -> None:
        """Wait until it has said so. Raises `MigrationError` when it has not within ``seconds``."""
        with trio.move_on_after(seconds) as scope:
            await self._said[kind].wait()
        if scope.cancelled_caught:
            raise MigrationError(
                f'{self.name} did not say "{kind.name.lower()}" within {seconds:g} s{because(self._channel)}'
            )

    async def last_words(self, seconds: float) -> None:
        """Wait until nothing more can be heard from it, or for so long."""
        with trio.move_on_after(seconds):
            await self._silent.wait()


def name_sender(error: KvmmigError, sender: str) -> None:
    """Put who sent it, a file's path too, before the text of an error about what was sent."""
    if sender not in str(error):
        error.args = (f"{sender}: {error}", *error.args[1:])
