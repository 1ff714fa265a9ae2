"""Transports as somebody else may have written them: one that does well, and some that do not."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from kvmmig.transport import Listener, ReceiveChannel, SendChannel, Transport, TransportURI


class Keeper(SendChannel):
    """Writes a file, and names it at its end."""

    copies = True

    def __init__(self, path: str) -> None:
        self.peer = path
        self._path = path
        self._kept = 0
        self._file = open(path + ".unfinished", "wb", buffering=0)  # noqa: SIM115 - it is the channel's

    async def send_some(self, buffers: Sequence[memoryview]) -> int:
        await trio.lowlevel.checkpoint()
        count = self._file.write(buffers[0][: 1 << 20])
        self._kept += count
        return count

    async def flush(self) -> None:
        await trio.lowlevel.checkpoint()

    def counters(self) -> dict[str, float]:
        return {"keep.stored-bytes": self._kept, "keep.files": 1}

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()
        if not self._file.closed:
            self._file.close()
            os.rename(self._path + ".unfinished", self._path)

    def abort(self) -> None:
        if not self._file.closed:
            self._file.close()
            os.unlink(self._path + ".unfinished")


class Reader(ReceiveChannel):
    def __init__(self, path: str) -> None:
        self.peer = path
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - it is the channel's

    async def receive_some(self, buffer: memoryview) -> int:
        await trio.lowlevel.checkpoint()
        return self._file.readinto(buffer[: 1 << 20]) or 0

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()
        self._file.close()

    def abort(self) -> None:
        self._file.close()


class Rude(Reader):
    """Raises when it is to end."""

    async def aclose(self) -> None:
        raise ZeroDivisionError("no goodbye")

    def abort(self) -> None:
        raise ZeroDivisionError("no goodbye")


class Clinging(Reader):
    """Does not end."""

    async def aclose(self) -> None:
        with trio.CancelScope(shield=True):
            await trio.sleep_forever()


class Shelf(Listener):
    def __init__(self, uri: TransportURI, reader: type[Reader]) -> None:
        self.uri = uri
        self._reader = reader

    @asynccontextmanager
    async def accept(self) -> AsyncIterator[ReceiveChannel]:
        async with self._reader(self.uri.target) as channel:
            yield channel


class Keep(Transport):
    """Does all that it promises."""

    summary = "keeps a guest on a shelf"
    syntax = "keep:PATH"
    stores = True
    arrives_at_once = True
    reader: type[Reader] = Reader

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[SendChannel]:
        async with Keeper(self.uri.target) as channel:
            yield channel

    @asynccontextmanager
    async def listen(self) -> AsyncIterator[Listener]:
        yield Shelf(self.uri, self.reader)


class FromRude(Keep):
    reader = Rude


class FromClinging(Keep):
    reader = Clinging


class Sink(SendChannel):
    """Forgets what it is given; the base of those that do not even that."""

    copies = True

    def __init__(self, target: str) -> None:
        self.peer = target

    async def send_some(self, buffers: Sequence[memoryview]) -> int:
        await trio.lowlevel.checkpoint()
        return len(buffers[0])

    async def flush(self) -> None:
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()

    def abort(self) -> None:
        pass


def _say_so(path: str) -> None:
    Path(path).touch()


class Deaf(Sink):
    """Says by a file that it was called, and does not let itself be cancelled."""

    async def send_some(self, buffers: Sequence[memoryview]) -> int:
        _say_so(self.peer)
        with trio.CancelScope(shield=True):
            await trio.sleep_forever()
        return 0


class Holding(Sink):
    """Says by a file that it was called, and holds the event loop for good."""

    async def send_some(self, buffers: Sequence[memoryview]) -> int:
        _say_so(self.peer)
        while True:
            time.sleep(1)  # noqa: ASYNC251 - the very slip


class Buggy(Sink):
    async def send_some(self, buffers: Sequence[memoryview]) -> int:
        raise ZeroDivisionError("a slip")


class FailsAtTheEnd(Sink):
    """Takes all of it, and then nobody knows where that is."""

    async def aclose(self) -> None:
        raise ZeroDivisionError("where is it?")


class _ToNobody(Transport):
    channel: type[Sink]

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[SendChannel]:
        async with self.channel(self.uri.target) as channel:
            yield channel

    @asynccontextmanager
    async def listen(self) -> AsyncIterator[Listener]:
        yield Shelf(self.uri, Reader)


class ToDeaf(_ToNobody):
    channel = Deaf


class ToHolding(_ToNobody):
    channel = Holding


class ToBuggy(_ToNobody):
    channel = Buggy


class ToFailing(_ToNobody):
    channel = FailsAtTheEnd
