"""What a destination hears from one source, and says to it, over one channel."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

from kvmmig import stream
from kvmmig.errors import (
    ImageError,
    KvmError,
    KvmmigError,
    MigrationError,
    StateMismatch,
    StreamError,
    TransportError,
)
from kvmmig.migration.peer import name_sender
from kvmmig.transport.guard import GuardedChannel
from kvmmig.transport.peers import named
from kvmmig.transport.supervision import supervised

T = TypeVar("T")

#: How long a refused source may take to read why.
_LAST_WORDS = 0.5
_LAST_WORDS_OF_A_CANCEL = 0.05
#: Seconds that the channel has for its orderly end once the guest runs.
_GOODBYE = 10.0


class Conversation:
    """The destination's half. `work` around whatever uses it: a call that can't be ended is left behind."""

    def __init__(self, channel: GuardedChannel, strays: trio.Nursery) -> None:
        """Whoever opened ``channel`` ends it. What can't be ended stays in ``strays``."""
        self.channel = channel
        #: Who sends, and whose process that is.
        self.peer = named(channel.peer, channel.identity)
        self.decoder = stream.Decoder(stream.Direction.FORWARDS)
        self._encoder = stream.Encoder(stream.Direction.BACKWARDS)
        self._cursor = stream.Cursor()
        self._strays = strays
        self._heard_at = trio.current_time()

    @property
    def silence(self) -> float:
        """Seconds since the last byte came."""
        return trio.current_time() - self._heard_at

    def note_progress(self) -> None:
        """This side has held it up until now: its silence begins here."""
        self._heard_at = trio.current_time()

    async def work(
        self,
        call: Callable[[], Awaitable[T]],
        *,
        overdue: Callable[[], KvmmigError | None] = lambda: None,
    ) -> T:
        """Await ``call()``, which may use all of this. As `supervised`."""
        return await supervised(call, self._strays, stuck=self.channel.stuck, overdue=overdue)

    async def event(self) -> stream.Event:
        """What the source says next. Raises `StreamError`, and `MigrationError` where it gives up.

        After a cancel it goes on where it was.
        """
        while True:
            count = await self.channel.receive_some(self.decoder.buffer())
            self._heard_at = trio.current_time()
            if not count:
                self.decoder.end_of_stream()
            event = self.decoder.advance(count)
            if isinstance(event, stream.Fail):
                raise MigrationError(f"{self.peer} gave the migration up: {event.text}")
            if event is not None:
                return event

    async def end_of_stream(self) -> None:
        """Nothing more may come. Raises `StreamError`."""
        if await self.channel.receive_some(memoryview(bytearray(1))):
            raise StreamError(f"the stream goes on behind its end at byte {self.decoder.position}")

    async def say(self, kind: stream.Kind) -> None:
        """Nothing, where the channel has no way back."""
        if self.channel.two_way:
            await self._send(self._opening() + self._encoder.signal(kind))

    async def say_goodbye(self) -> None:
        """The guest runs here, whatever becomes of the channel: say so, and end it."""
        with trio.move_on_after(_GOODBYE), contextlib.suppress(TransportError):
            await self.work(self._goodbye)
        self.channel.abort()

    async def refuse(self, error: BaseException) -> None:
        """Tell the source why it ends, let it read that, and end the channel. Never raises.

        ``error`` gets the sender's name where it is about what was sent.
        """
        patience = _LAST_WORDS if isinstance(error, KvmmigError) else _LAST_WORDS_OF_A_CANCEL
        with trio.move_on_after(patience, shield=True), contextlib.suppress(KvmmigError):
            await self.work(lambda: self._last_words(error))
        self.channel.abort()
        if isinstance(error, StreamError | ImageError | StateMismatch) or type(error) is KvmError:
            name_sender(error, self.peer)

    async def _goodbye(self) -> None:
        await self.say(stream.Kind.RUNNING)
        await self.channel.aclose()

    async def _last_words(self, error: BaseException) -> None:
        if not self.channel.two_way or isinstance(error, TransportError):
            return
        text = str(error) if isinstance(error, KvmmigError) else "the destination was stopped"
        with contextlib.suppress(KvmmigError):
            await self._send(self._opening() + self._encoder.fail(text))
            scratch = memoryview(bytearray(1 << 16))
            while await self.channel.receive_some(scratch):
                pass

    def _opening(self) -> bytes:
        return self._encoder.preamble() if self._encoder.state is stream.StreamState.PREAMBLE else b""

    async def _send(self, data: bytes) -> None:
        """After a cancel the rest is still in the cursor, and goes before what is sent next."""
        self._cursor.put(data)
        while not self._cursor.empty:
            self._cursor.advance(await self.channel.send_some(self._cursor.head()))
