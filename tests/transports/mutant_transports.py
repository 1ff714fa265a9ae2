"""Transports in memory that break one promise each: in listening, in storing, or in what they say."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, cast

import trio

from kvmmig.errors import ChannelClosed, ConnectFailed
from kvmmig.testing import MemoryTransport, memory_channel_pair
from kvmmig.transport import (
    Channel,
    Listener,
    ReceiveChannel,
    SendChannel,
    Transport,
    TransportURI,
    transport_for,
)

left_open: list[int] = []


def leave_one_open() -> None:
    left_open.append(os.open("/dev/null", os.O_RDONLY))


class _Passing(Listener):
    """Does what the listener below does."""

    def __init__(self, below: Listener) -> None:
        self.below = below
        self.uri = below.uri
        self.accepted = 0

    @asynccontextmanager
    async def accept(self) -> AsyncIterator[ReceiveChannel]:
        async with self.below.accept() as channel:
            yield channel


class _Listening(MemoryTransport):
    """Its listener is of another class."""

    listener: type[_Passing] = _Passing

    @asynccontextmanager
    async def listen(self) -> AsyncIterator[Listener]:
        async with super().listen() as listener:
            yield self.listener(listener)


class DeadAfterACancel(_Listening):
    class listener(_Passing):  # noqa: N801 - a class attribute
        @asynccontextmanager
        async def accept(self) -> AsyncIterator[ReceiveChannel]:
            if self.accepted:
                raise ConnectFailed("that was it")
            try:
                async with self.below.accept() as channel:
                    yield channel
            except trio.Cancelled:
                self.accepted += 1
                raise


class AcceptingOnce(_Listening):
    class listener(_Passing):  # noqa: N801
        @asynccontextmanager
        async def accept(self) -> AsyncIterator[ReceiveChannel]:
            self.accepted += 1
            if self.accepted > 1:
                await trio.sleep_forever()
            async with self.below.accept() as channel:
                yield channel


class NeverWoken(_Listening):
    """Whoever accepts is not told that the listener has ended."""

    class listener(_Passing):  # noqa: N801
        @asynccontextmanager
        async def accept(self) -> AsyncIterator[ReceiveChannel]:
            try:
                async with self.below.accept() as channel:
                    yield channel
            except ConnectFailed:
                await trio.sleep_forever()


class SayingText(_Listening):
    class listener(_Passing):  # noqa: N801
        def __init__(self, below: Listener) -> None:
            super().__init__(below)
            self.uri = cast(Any, str(below.uri))


class TakingChannelsAlong(_Listening):
    """The channels that it has accepted end with it."""

    @asynccontextmanager
    async def listen(self) -> AsyncIterator[Listener]:
        accepted: list[ReceiveChannel] = []

        class Keeping(_Passing):
            @asynccontextmanager
            async def accept(self) -> AsyncIterator[ReceiveChannel]:
                async with self.below.accept() as channel:
                    accepted.append(channel)
                    yield channel

        async with MemoryTransport.listen(self) as listener:
            yield Keeping(listener)
        for channel in accepted:
            channel.abort()


class FailingOnJunk(Transport):
    """Over TCP, with a greeting; whoever says another one ends the listening."""

    def __init__(self, uri: TransportURI) -> None:
        super().__init__(uri)
        self.inner = transport_for(TransportURI("tcp", uri.target))

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[SendChannel]:
        async with self.inner.connect() as channel:
            await channel.send_some([memoryview(b"!")])
            yield channel

    @asynccontextmanager
    async def listen(self) -> AsyncIterator[Listener]:
        class Greeted(_Passing):
            @asynccontextmanager
            async def accept(self) -> AsyncIterator[ReceiveChannel]:
                async with self.below.accept() as channel:
                    greeting = bytearray(1)
                    await channel.receive_some(memoryview(greeting))
                    if greeting != b"!":
                        raise ConnectFailed("that was no greeting")
                    yield channel

        async with self.inner.listen() as listener:
            yield Greeted(listener)


class ConnectingToNobody(MemoryTransport):
    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Channel]:
        try:
            async with super().connect() as channel:
                yield channel
        except ConnectFailed:
            yield memory_channel_pair()[0]


class LeavingAfterACancel(MemoryTransport):
    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Channel]:
        leave_one_open()
        async with super().connect() as channel:
            yield channel
        os.close(left_open.pop())


class TakingAnyOption(MemoryTransport):
    def _take_options(self, owner: str, given: Any) -> dict[str, str]:
        return {}


class KeepingItsURIAsText(MemoryTransport):
    def __init__(self, uri: TransportURI) -> None:
        super().__init__(uri)
        self.uri = cast(Any, str(uri))


class OpeningEarly(MemoryTransport):
    def __init__(self, uri: TransportURI) -> None:
        super().__init__(uri)
        leave_one_open()


class MemoryStore(Transport):
    """Conforms: what was sent is there once `aclose` has returned."""

    summary = "a store in memory"
    syntax = "store:NAME"
    stores = True
    arrives_at_once = True

    kept: dict[str, bytes]

    def __init__(self, uri: TransportURI) -> None:
        super().__init__(uri)
        self.kept = _kept.setdefault(type(self), {})

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[SendChannel]:
        await trio.lowlevel.checkpoint()
        async with self.channel()(self.kept, self.uri.target) as channel:
            yield channel

    def channel(self) -> type[_Saving]:
        return _Saving

    @asynccontextmanager
    async def listen(self) -> AsyncIterator[Listener]:
        await trio.lowlevel.checkpoint()
        yield _StoreListener(self.uri, self.kept)


_kept: dict[type, dict[str, bytes]] = {}


def forget() -> None:
    """Nothing was stored yet."""
    _kept.clear()


class _Saving(SendChannel):
    def __init__(self, kept: dict[str, bytes], name: str) -> None:
        self.peer = name
        self.kept = kept
        self.data = bytearray()
        self.ended = self.busy = False

    async def send_some(self, buffers: Sequence[memoryview]) -> int:
        await trio.lowlevel.checkpoint()
        self.check()
        self.data += buffers[0][: 1 << 18]
        return min(len(buffers[0]), 1 << 18)

    async def flush(self) -> None:
        await trio.lowlevel.checkpoint()
        self.check()

    def abort(self) -> None:
        self.ended = True

    def commit(self) -> None:
        self.kept[self.peer] = bytes(self.data)

    async def aclose(self) -> None:
        try:
            for _ in range(10):
                await trio.lowlevel.checkpoint()
        except BaseException:
            self.abort()
            raise
        if not self.ended:
            self.commit()
        self.ended = True

    def check(self) -> None:
        if self.ended:
            raise ChannelClosed(f"{self.peer} was closed by this side")


class _StoreListener(Listener):
    def __init__(self, uri: TransportURI, kept: dict[str, bytes]) -> None:
        self.uri = uri
        self.kept = kept

    @asynccontextmanager
    async def accept(self) -> AsyncIterator[ReceiveChannel]:
        await trio.lowlevel.checkpoint()
        if self.uri.target not in self.kept:
            raise ConnectFailed(f"there is no {self.uri.target}")
        async with _Reading(self.uri.target, self.kept[self.uri.target]) as channel:
            yield channel


class _Reading(ReceiveChannel):
    def __init__(self, name: str, data: bytes) -> None:
        self.peer = name
        self.left = memoryview(data)
        self.ended = False

    async def receive_some(self, buffer: memoryview) -> int:
        await trio.lowlevel.checkpoint()
        if self.ended:
            raise ChannelClosed(f"{self.peer} was closed by this side")
        count = min(len(buffer), len(self.left), 1 << 18)
        buffer[:count] = self.left[:count]
        self.left = self.left[count:]
        return count

    def abort(self) -> None:
        self.ended = True

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()
        self.ended = True


class StoringOnAbort(MemoryStore):
    def channel(self) -> type[_Saving]:
        class Channel(_Saving):
            def abort(self) -> None:
                if not self.ended:
                    self.commit()
                super().abort()

        return Channel


class StoringAtFirst(MemoryStore):
    """It has its name before it is whole."""

    def channel(self) -> type[_Saving]:
        class Channel(_Saving):
            async def send_some(self, buffers: Sequence[memoryview]) -> int:
                count = await super().send_some(buffers)
                self.commit()
                return count

        return Channel


class StoringThoughCancelled(MemoryStore):
    def channel(self) -> type[_Saving]:
        class Channel(_Saving):
            async def aclose(self) -> None:
                if not self.ended:
                    self.commit()
                await super().aclose()

        return Channel


class StoringWhatFailed(MemoryStore):
    """Its block commits however it ends."""

    def channel(self) -> type[_Saving]:
        class Channel(_Saving):
            async def __aexit__(
                self,
                kind: type[BaseException] | None,
                value: BaseException | None,
                trace: TracebackType | None,
            ) -> None:
                with trio.CancelScope(shield=True):
                    await self.aclose()

        return Channel


class Stalled(MemoryStore):
    """Conforms, and never gets done."""

    def channel(self) -> type[_Saving]:
        class Channel(_Saving):
            async def aclose(self) -> None:
                try:
                    if not self.ended:
                        await trio.sleep_forever()
                    await trio.lowlevel.checkpoint()
                except BaseException:
                    self.abort()
                    raise

        return Channel


class StalledButStoring(Stalled):
    def channel(self) -> type[_Saving]:
        class Channel(_Saving):
            async def aclose(self) -> None:
                try:
                    await trio.sleep_forever()
                finally:
                    self.commit()

        return Channel


class StalledForEver(Stalled):
    """Ignores its cancel, until it is aborted."""

    def channel(self) -> type[_Saving]:
        class Channel(_Saving):
            def __init__(self, kept: dict[str, bytes], name: str) -> None:
                super().__init__(kept, name)
                self.scope = trio.CancelScope(shield=True)

            def abort(self) -> None:
                super().abort()
                self.scope.cancel()

            async def aclose(self) -> None:
                with self.scope:
                    await trio.sleep_forever()

        return Channel
