"""A listener that has nobody to wait for."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from kvmmig.transport.contract import Listener, ReceiveChannel
from kvmmig.transport.uri import TransportURI


class AtOnceListener(Listener):
    """Holds nothing open; every `accept` opens what is there and receives it from its beginning.

    For a transport that `arrives_at_once <Transport.arrives_at_once>`.
    """

    def __init__(self, uri: TransportURI, opened: Callable[[], Awaitable[ReceiveChannel]]) -> None:
        """``opened`` opens it. It raises `ConnectFailed`, and a cancel of it leaves nothing."""
        self.uri = uri
        self._opened = opened

    @asynccontextmanager
    async def accept(self) -> AsyncIterator[ReceiveChannel]:
        async with await self._opened() as channel:
            yield channel
