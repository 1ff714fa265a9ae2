"""The transports that pass the suite, by name: how each is made for a check."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import cast

import trio

from kvmmig.testing import Check, Ends, Maker, MemoryTransport, transport_ends
from kvmmig.transport import (
    AnyChannel,
    Listener,
    PassingChannel,
    SendChannel,
    Side,
    Transport,
    TransportURI,
    Wrapper,
    transport_for,
)
from kvmmig.transport.supervision import connected, listening


class Greeting(Wrapper):
    """Has a handshake, for which both sides must be there, and a task of its own in each channel."""

    @asynccontextmanager
    async def wrap(self, channel: AnyChannel, *, side: Side) -> AsyncIterator[AnyChannel]:
        passing = PassingChannel(channel)
        for sends in (side is Side.SOURCE, side is Side.DESTINATION):
            if sends:
                await passing.send_some([memoryview(b"!")])
            else:
                await passing.receive_some(memoryview(bytearray(1)))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            yield passing
            nursery.cancel_scope.cancel()


class Guarded(Wrapper):
    """As the engine sees a transport: through the guard."""

    strays: trio.Nursery

    def wrap(self, channel: AnyChannel, *, side: Side) -> AbstractAsyncContextManager[AnyChannel]:
        raise AssertionError("the guard is around the transport, not around its channels")

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[SendChannel]:
        async with connected(self.inner, self.strays) as channel:
            yield channel

    @asynccontextmanager
    async def listen(self) -> AsyncIterator[Listener]:
        async with listening(self.inner, self.strays) as listener:
            yield cast(Listener, listener)


OURS = {"greeting": Greeting, "guarded": Guarded}


def transport_of(uri: TransportURI) -> Transport:
    if uri.wrappers and uri.wrappers[0] in OURS:
        return OURS[uri.wrappers[0]](uri, transport_of(uri.unwrapped()[1]))
    return MemoryTransport(uri) if uri.scheme == "memory" else transport_for(uri)


def _fd(number: int) -> Transport:
    return transport_for(TransportURI("fd", str(number)))


def _pipe_fds() -> tuple[Transport, Transport]:
    reading, writing = os.pipe()
    return _fd(writing), _fd(reading)


def _socket_fds() -> tuple[Transport, Transport]:
    ours, theirs = socket.socketpair()
    return _fd(ours.detach()), _fd(theirs.detach())


def exec_ends(tmp_path: Path, **options: str) -> AbstractAsyncContextManager[Ends]:
    saving = transport_for(TransportURI("exec", f"cat > {tmp_path}/a.img", options))
    return transport_ends(transport_for(TransportURI("exec", f"cat {tmp_path}/a.img")), saving, stored=True)


def maker_of(name: str, tmp_path: Path) -> Maker:
    match name:
        case "fd of a pipe":
            return _pipe_fds
        case "fd of a socket":
            return _socket_fds
        case "exec":
            return lambda: exec_ends(tmp_path)
        case uri:
            return lambda: transport_of(TransportURI.parse(uri.replace("{tmp}", str(tmp_path))))


def name_of(check: Check) -> str:
    return check.__name__.removeprefix("check_")
